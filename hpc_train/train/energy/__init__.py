"""Joules: meters and their sensors."""
