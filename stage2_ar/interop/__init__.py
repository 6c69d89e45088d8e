"""Transformers of other programs as pipelines of this one."""
