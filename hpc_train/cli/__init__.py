"""The command line, one file a group of commands.

A command imports what it needs inside: reports never load MPI or torch.
"""
