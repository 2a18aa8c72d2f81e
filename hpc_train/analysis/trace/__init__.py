"""A run as a timeline that Perfetto and chrome://tracing show: every rank's steps on one clock."""
