"""Smaller models: fewer bits a weight, fewer experts."""
