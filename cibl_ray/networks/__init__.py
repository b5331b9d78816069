"""Backbone, projection head and classification head."""
