"""A small vision-language model that tells the direction of motion in four frames."""
