"""A small BERT that classifies what a text says about a thing as positive or negative."""
