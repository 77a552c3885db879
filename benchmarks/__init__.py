"""Measurements: one folder a suite, each a script that writes its results as JSON beside it."""
