"""Sweeps: what they vary, what they cost, how they run, and how their trials compare."""
