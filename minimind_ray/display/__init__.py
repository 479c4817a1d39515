"""What a terminal shows of runs and sweeps, for the commands and the Python interface."""
