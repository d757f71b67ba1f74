"""Data sets of every layout, as one stream of entries."""
