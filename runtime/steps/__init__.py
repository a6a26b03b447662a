"""The steps of a composition at run time, forward and backward."""
