"""Reports: `render` for the terminal, `save` for files, `chart` for pictures."""
