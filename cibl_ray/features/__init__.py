"""Features of a frozen backbone: computed once, kept in files, and read by every run that trains a head on them."""
