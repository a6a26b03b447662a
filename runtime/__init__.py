"""Plan to torch operators: the float64 reference, the CPU and CUDA back ends, the cache and the import hook."""
