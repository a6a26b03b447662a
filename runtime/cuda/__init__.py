"""The CUDA back end: operands, work lists and launches of the generated kernels."""
