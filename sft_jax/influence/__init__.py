"""Which training examples pull the model away from held-out ones: similarity of gradients under random projection."""
