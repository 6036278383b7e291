"""Evaluation of a trained model: held-out likelihood with its standard error."""
