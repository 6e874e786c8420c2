"""Examples to rows of batches, as a function of the row number."""
