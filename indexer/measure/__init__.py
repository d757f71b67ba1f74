"""What is measured of a reference set and its index."""


class NothingToMeasure(ValueError):
    """References or images are missing; the message says what to do."""
