"""What judges embeddings: heads, the vote of neighbours, and their calibration."""
