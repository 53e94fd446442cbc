"""Finds every nucleus in H&E histology, guided by a frozen foundation encoder."""

__version__ = "0.1.0"
