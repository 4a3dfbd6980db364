"""What a run keeps and shows: checkpoints, resume, logs, plots."""
