"""Checkpoints as Hugging Face folders, FP8 and GGUF, in and out."""
