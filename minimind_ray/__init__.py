"""Train small language models on one machine or on a Ray cluster."""
