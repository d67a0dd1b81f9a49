"""`python -m flatmin` is the command line."""

from flatmin.cli.main import main

main()
