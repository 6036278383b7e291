"""Optimizers: AdamW or Muon, their schedule, and the running average that is evaluated."""

from atat_fast.training.optimizers.optimizers import Average, Optimizers, check_optim, learning_rate

__all__ = ["Average", "Optimizers", "check_optim", "learning_rate"]
