"""Whole slides: read at any resolution, divided into regions, their nuclei kept on disk and written out as a stream."""
