"""Many runs of one recipe: sweeps over keys, and curves over amounts of data."""
