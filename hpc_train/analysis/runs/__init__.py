"""Run directories read back, each rank's file once."""
