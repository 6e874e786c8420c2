"""Text to ids and back, with the place of each token."""
