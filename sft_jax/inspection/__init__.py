"""What is trained on, for people: examples and packed rows with their weights, problems and statistics; never jax."""
