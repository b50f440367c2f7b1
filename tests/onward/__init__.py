"""What one experiment found, used in another."""
