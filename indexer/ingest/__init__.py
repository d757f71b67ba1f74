"""The ways by which references come into the store."""
