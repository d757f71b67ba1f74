"""Answer whether an image was generated, with the neighbours that say so."""
