"""Checkpoints: pieces of a state, their copy in host memory, the format on disk, which ones are kept, and the saver."""
