"""Training dynamics: the loss of every example over time, and what it says about the data. Never jax."""
