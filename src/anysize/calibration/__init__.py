"""Run a source on real data and keep what choosing a smaller target needs to know about its activations."""
