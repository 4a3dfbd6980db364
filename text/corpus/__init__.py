"""Pretraining text: cleaning, token shards, mixtures."""
