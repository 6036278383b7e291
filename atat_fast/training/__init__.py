"""The trainer: one loop and its small parts."""
