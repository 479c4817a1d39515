"""Experiment trackers: services that receive a run's metrics, such as Weights & Biases.

    tracker.py       `Tracker`, the interface that every tracker implements
    registry.py      the table of trackers, and `Trackers`, all trackers of one run
    wandb.py         Weights & Biases; wandb_mode.py settles online or offline, wandb_files.py handles its local files

To add a tracker, write a file with a `Tracker` and add a line to TRACKERS in registry.py.
"""
