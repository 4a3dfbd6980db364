"""Fast kernels: C for CPUs, compiled on the machine at hand, each file beside its caller; tensors in, tensors out."""
