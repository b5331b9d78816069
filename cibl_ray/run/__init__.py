"""The run folder: its files, its checkpoints, its log, its progress."""
