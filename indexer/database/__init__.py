"""The way to Postgres, and its tables."""
