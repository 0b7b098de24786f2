"""Complete runs as short functions that yield what happens, for whoever shows it."""
