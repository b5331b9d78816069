"""CIBL and its relatives: training, evaluation and their commands. Importing this package imports neither Ray nor FFCV."""

__version__ = "0.1.0"
