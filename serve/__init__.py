"""Answers: an exported bundle behind HTTP, or alone on an edge device. No torch here."""
