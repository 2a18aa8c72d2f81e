"""How gradients are summed and weights kept alike, by strategy."""
