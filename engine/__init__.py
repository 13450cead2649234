"""Runs: the loop, faults, resume, checkpoints, processes."""
