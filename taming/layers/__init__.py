"""Shared building blocks of the models."""
