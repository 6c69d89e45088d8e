"""Codebooks to and from other programs. Each import and each export is checked before it counts."""
