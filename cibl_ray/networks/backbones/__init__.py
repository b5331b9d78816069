"""Backbones, images to features: one file a family. `config` says which there are and where their weights come from."""
