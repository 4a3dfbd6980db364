"""Chatting with a checkpoint and measuring what it knows."""
