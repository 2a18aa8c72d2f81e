"""`hpc-train doctor`: each check tries the thing itself on every rank, then evaluates what all ranks saw."""
