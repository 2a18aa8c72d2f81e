"""Warm starts: the commands of tests are children of a process that has loaded torch, which takes 1.5 s of CPU each time.

A test, or mpirun, starts `stub.py` in place of `hpc-train`. The stub hands its words, environment, folder and streams to
`server.py`, which forks a child that runs the command. The stub passes signals on, and ends as the child ends. So a
rank is still a process of its own that starts MPI by itself, and mpirun still sees it die.

What a process reads while it loads (LD_LIBRARY_PATH, OMP_NUM_THREADS, a locale) needs a cold start: see `tests/jobs.py`.
With HPC_TRAIN_COLD=1, as in `make test-all`, every start is a cold one.
"""
