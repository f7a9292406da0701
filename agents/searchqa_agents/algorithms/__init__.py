"""The algorithms, one file each; importing this package registers them."""
