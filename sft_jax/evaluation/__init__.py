"""Generation, scores and held-out evaluation."""
