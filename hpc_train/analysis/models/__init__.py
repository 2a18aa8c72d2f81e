"""Performance models: measurements, fits, predictions."""
