"""The front of Lory: HTTP in, SSE out. It must not know torch, tensors or the scheduler."""

__version__ = "0.1.0"
