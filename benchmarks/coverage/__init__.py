"""Do the printed intervals, p and verdicts hold what they state? A seeded simulation."""
