"""What is measured of a reference set and its index."""
