"""A small decoder that completes a period of years with a later year."""
