"""Sweeps: the search, the trials, the report."""
