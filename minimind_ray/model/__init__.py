"""The network, its adapters, checkpoints in and out, and text generation."""
