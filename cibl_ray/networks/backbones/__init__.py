"""Backbones: one file a family, with a function a network. `cibl_ray.networks.config.BACKBONES` lists them."""
