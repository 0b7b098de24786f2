"""A server for a model: its interface over HTTP and the page that shows the experts at work."""
