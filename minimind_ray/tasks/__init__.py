"""Benchmarks: the model class for lm-eval, tasks that need no download, and one row of results per item."""
