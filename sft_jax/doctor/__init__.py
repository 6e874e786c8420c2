"""Whether data are fit to train on: faults of rows, of sets and of splits, by file and line. Numpy, never jax."""
