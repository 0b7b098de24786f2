"""Given a model and a cluster: layouts, memory and traffic, estimated or simulated."""
