"""Why a result is disappointing: the files of a run read, causes looked for in order, and told."""
