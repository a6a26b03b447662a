"""`Compute` steps: values over one sequence, by torch on whole arrays or by generated kernels of rows."""
