"""An upload becomes a verdict."""
