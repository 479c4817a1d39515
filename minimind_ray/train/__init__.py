"""One optimizer step, the training loop around it, and the run directory with its checkpoints."""
