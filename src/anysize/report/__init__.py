"""What a comparison found, and how it is shown: pure functions of results."""
