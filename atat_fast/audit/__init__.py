"""Everything of a small alphabet counted out: which maskings, weights and schedules give a bound."""
