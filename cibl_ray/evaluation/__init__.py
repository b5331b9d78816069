"""Predictions, metrics and pictures of a network."""
