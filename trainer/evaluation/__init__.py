"""What a checkpoint is worth on images that trained nothing."""
