"""What is wrong with a data set of images, before anybody trains on it."""
