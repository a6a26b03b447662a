"""Measurements: patterns beside the implementations that people would use instead."""
