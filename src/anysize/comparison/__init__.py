"""Comparisons: arms, seeds and learning rates over the same tokens, and what each needs to come as far as another."""
