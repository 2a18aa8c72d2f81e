"""Simulation of a training step on numbers of ranks, networks and strategies that nobody has measured."""
