"""Several ranks: how they meet, and how a model is spread over them."""
