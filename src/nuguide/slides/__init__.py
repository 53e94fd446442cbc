"""Whole slides: opened, read at any resolution, and searched for tissue."""
