"""The tools that are timed, one module each; a module is imported in its own environment alone."""
