"""The files of a run: its directory, metrics and checkpoints."""
