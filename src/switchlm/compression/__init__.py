"""Smaller models: fewer bits per weight, fewer experts."""
