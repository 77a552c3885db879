"""How fast training is beside a bare loop."""
