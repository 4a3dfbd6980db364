"""Compare a model's reply with a reference answer."""
