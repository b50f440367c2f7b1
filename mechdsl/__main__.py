"""`python -m mechdsl`."""

from mechdsl.cli.entry import main

main()
