"""Adversarial parts: discriminators and their losses."""
