"""The demo: the whole story on a model that is pretrained here, in some minutes and without a network."""
