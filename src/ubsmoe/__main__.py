"""`python -m ubsmoe`."""

from ubsmoe.cli import main

main()
