"""What runs give, kept to hold later commits against: `python -m tests.baseline`."""
