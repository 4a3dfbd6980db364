"""Conversations, preferences and problems as token sequences."""
