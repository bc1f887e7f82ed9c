"""What a run leaves on disk: its directory, metrics and checkpoints, and the files that they are made of."""
