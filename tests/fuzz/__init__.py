"""Thousands of generated inputs: the program reports what is wrong with each, or handles it correctly.

One module a kind of input holds a hypothesis strategy of cases (`KINDS` in `kinds.py`). A case makes its files in a
folder of its own and calls `hpc-train`; `play.py` says what may come of that. The calls run in children forked off a
process that has loaded torch and h5py (`server.py`), which costs 20 ms where a start costs seconds, and a crash or hang
of one ends that child alone. `python -m tests.fuzz KIND --seed S --case C` plays one case again.
"""
