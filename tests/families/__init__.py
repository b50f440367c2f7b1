"""Every architecture that the model library builds, against hooks written out for each."""
