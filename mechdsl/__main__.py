"""`python -m mechdsl`."""

from mechdsl.cli import main

main()
