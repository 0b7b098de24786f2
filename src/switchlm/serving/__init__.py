"""A server for a model: its HTTP interface, and a page that shows the expert assignment."""
