"""The network, its adapters, text generation, and reading and writing of checkpoints."""
