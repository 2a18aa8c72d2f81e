"""What a trained model is used for: predictions of data, its measures on data, and how long a caller waits."""
