"""The same sweeps on mechdsl, on a plain hook loop and on other libraries, timed in turns."""
