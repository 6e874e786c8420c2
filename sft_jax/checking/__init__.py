"""The contracts of training, measured on a user's own model, data and mesh."""
