"""Rows of files and data sets of all kinds, by number."""
