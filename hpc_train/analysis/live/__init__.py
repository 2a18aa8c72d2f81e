"""What a run does right now, read from the end of its files while it works."""
