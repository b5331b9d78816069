"""The published tables and the papers' claims, from runs to tables and pictures."""
