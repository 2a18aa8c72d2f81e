"""How many nodes to ask for next time."""
