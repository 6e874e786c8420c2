"""Saved state: arrays by path on disk, verified to the last byte."""
