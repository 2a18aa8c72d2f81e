"""What runs anywhere afterwards: needs only the base install."""
