"""Losses: pure functions of tensors, and the step that picks one by configuration."""
