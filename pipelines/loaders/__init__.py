"""Loaders: from .beton files to batches of views."""
