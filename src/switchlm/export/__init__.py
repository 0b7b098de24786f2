"""Models for other runtimes: exported programs of PyTorch, ONNX, and plain T5 of transformers."""
