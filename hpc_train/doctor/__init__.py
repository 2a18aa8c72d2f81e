"""What `hpc-train doctor` does on each rank: checks that do the thing, and judge what every rank saw."""
