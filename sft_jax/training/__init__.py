"""The optimizer, the step, the state and the run."""
