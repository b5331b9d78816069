"""Classification heads: one file each, with the head's configuration and its formula."""
