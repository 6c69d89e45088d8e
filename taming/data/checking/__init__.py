"""Everything that is wrong with a data set, found in one pass."""
