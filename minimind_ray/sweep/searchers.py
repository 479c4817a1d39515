"""Points that are found while a sweep runs: neighbours for population based training, and Optuna's proposals."""
