"""Training: what a model starts from, the data, the losses and the optimizer, run by transformers' Trainer."""
