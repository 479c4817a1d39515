"""Experiment trackers: what a run's metrics are sent to."""
