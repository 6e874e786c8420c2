"""Prepared examples on disk, and the processes that make them."""
