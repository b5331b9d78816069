"""From images to .beton files."""
