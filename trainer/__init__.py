"""Learn the CoDE embedding and its heads."""
