"""Reading checkpoints, writing them, and recording where they came from."""
