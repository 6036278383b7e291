"""Enumerate a small alphabet to show which maskings, weights and schedules give a bound."""
