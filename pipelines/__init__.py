"""Images to batches: sources, long-tail profiles, the `.beton` writer, and the loaders. Imports nothing of `cibl_ray`."""
