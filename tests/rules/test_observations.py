"""What `observe` lines see, beside plain hooks."""
