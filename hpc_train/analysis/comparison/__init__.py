"""Two sets of runs held against each other: what changed, where, by how much, and what differs between them."""
