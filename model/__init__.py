"""The network of DeepSeek-V3 and how it runs. Knows nothing of training."""

from model.transformer import MiniDeepSeek, Output

__all__ = ["MiniDeepSeek", "Output"]
