"""Runs the command line as `python -m flatmin`."""

from flatmin.cli.main import main

main()
