"""Calls that repeat, as straight-line code."""
