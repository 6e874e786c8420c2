"""Rows of examples in, packed batches out: numpy and grain only, never jax."""
