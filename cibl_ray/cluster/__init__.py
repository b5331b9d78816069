"""Training in the workers of Ray Train: options, start, workers, storage."""
