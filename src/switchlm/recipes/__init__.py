"""Complete runs as short functions that yield events and metrics."""
