"""What the stage scripts share: the one loop, optimisers and schedules, checkpoints, ranks, losses, logging."""
