"""The maths of masked diffusion: how much is hidden, what is hidden, what the loss weighs, and how to go back."""
