"""The views of an image that training sees."""
