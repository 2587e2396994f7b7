"""Adapters and checkpoints on disk, read and written without building a model."""
