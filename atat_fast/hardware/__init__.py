"""The machine: what it computes on, what cards can do, what they report."""
