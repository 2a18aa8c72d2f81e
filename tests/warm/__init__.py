"""Warm starts: the commands of tests run in children of a process that has loaded torch, which takes 1.5 s of CPU.

A test, or mpirun, starts `stub.py` in place of `hpc-train`. The stub hands its words, environment, folder and streams
to `server.py`, which forks a child that runs the command. The stub passes signals on, and ends as the child ends. So
a rank is a process of its own that starts MPI by itself, and mpirun sees it die.

A variable that is read while Python or a library loads needs a cold start: `jobs.run` looks for those. With
HPC_TRAIN_COLD=1, as in `make test-all`, every start is a cold one.
"""
