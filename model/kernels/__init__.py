"""What CPUs compute in C, compiled on the machine at hand, each file beside its caller; without it PyTorch does."""
