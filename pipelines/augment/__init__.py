"""Augmentation: the recipe, the draws of each sample, and their application."""
