"""The machine: the device a run computes on, tables of cards, and what cards report."""
