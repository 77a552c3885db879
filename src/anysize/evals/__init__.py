"""Measure models: loss on held-out data, divergence from a source, and lm-eval's tasks on local files."""
