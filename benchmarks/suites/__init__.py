"""What is measured: one module a suite, with `works(device)`, its rows."""
