"""Simulated photographs and simulated generators."""
