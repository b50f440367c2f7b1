"""Assembly of experiment results from measured values: sampling units, variants, statistics."""
