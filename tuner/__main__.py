"""`python -m tuner`, the same as the `tuner` command: what launchers start."""

from tuner.cli import main

main()
