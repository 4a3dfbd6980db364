"""Low-rank adapters (LoRA), the frozen weights under them, and both as one model again."""
