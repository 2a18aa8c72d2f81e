"""Joules of a node, one small reader a file, each of a real interface; `choose.py` says which of them count."""
