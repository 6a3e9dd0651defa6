"""`python -m sixfold` is the `sixfold` command."""

from .server.cli import main

main()
