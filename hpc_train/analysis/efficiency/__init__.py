"""What was lost in one run: POP efficiencies and stragglers."""
