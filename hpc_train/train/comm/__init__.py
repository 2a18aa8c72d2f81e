"""Ranks and how they talk: MPI, torch.distributed, the connections of the watchdog."""
