"""The trainer: one loop, and the small parts it is made of."""
