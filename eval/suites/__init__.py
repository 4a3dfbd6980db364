"""Suites: what eval/run.py measures checkpoints on."""
