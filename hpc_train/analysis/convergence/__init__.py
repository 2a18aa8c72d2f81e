"""Time and energy to a target loss."""
