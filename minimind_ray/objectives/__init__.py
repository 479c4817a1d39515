"""The losses that training minimises, one file per kind of objective; see `Objective` in train/step.py."""
