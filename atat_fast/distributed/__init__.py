"""Several ranks: who they are, how a model is spread over them, what lies where."""
