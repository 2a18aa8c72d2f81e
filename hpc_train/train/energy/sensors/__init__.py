"""Energy sensors of a node: one file for each interface; `choose.py` decides which of them count."""
