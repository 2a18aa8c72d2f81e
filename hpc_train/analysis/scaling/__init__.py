"""Runs that may be compared: speedup, efficiency, laws, strategies, model FLOPs."""
