"""gpustack: an open-source manager for clusters of GPUs that serve AI models."""

__version__ = "0.1.0"
