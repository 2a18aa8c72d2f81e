"""Ranks and how they communicate: contexts, the mesh, MPI, torch.distributed, and the watchdog beside them."""
