"""Layouts of a model on a cluster: memory, traffic and time, estimated or simulated."""
