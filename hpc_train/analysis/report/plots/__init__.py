"""One figure a function: from facts to a `Plot`, which a renderer paints."""
