"""The run directory while a run writes it: attempts, checkpoints, records."""
