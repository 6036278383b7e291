"""Recipes trained side by side, and what is said of their difference."""
