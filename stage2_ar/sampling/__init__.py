"""Drawing codes: a grid, a grid of any size, several at once, quickly; and judging them."""
