"""What a trained model is worth: held-out likelihood with its standard error."""
