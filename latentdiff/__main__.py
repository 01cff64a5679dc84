"""`python -m latentdiff` is the command `latentdiff`."""

from latentdiff.cli import main

main()
