"""Experiment trackers: services and programs that receive a run's metrics, such as Weights & Biases.

    tracker.py       `Tracker`, the interface that every tracker implements
    registry.py      the table of trackers, and `Trackers`, all trackers of one run
    values.py        the forms in which trackers take values: flat names, numbers, tables
    wandb.py         Weights & Biases; wandb_mode.py settles online or offline, wandb_files.py handles its local files,
                     wandb_views.py saves views of sweeps
    swanlab.py       SwanLab; swanlab_process.py is the process in which a run talks to it
    tensorboard.py   TensorBoard's event files

To add a tracker: write a file with a `Tracker`, add a line to TRACKERS in registry.py, and add a record to the table in
config/trackers.py (this table needs no tracker's package, so the config can read it). Settings of its own are keys of
`TrackConfig` (config/schema.py).
"""
