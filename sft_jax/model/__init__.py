"""The decoder: arrays in, arrays out. Knows nothing of the run configuration or of data."""
