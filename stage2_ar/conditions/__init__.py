"""How a condition speaks to the transformer, one kind a file."""
