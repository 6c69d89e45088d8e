"""Tars of samples with an index: written, read, fetched, and made of tars of others."""
