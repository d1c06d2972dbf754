"""`python -m tuner`, the same as the `tuner` command: what launchers start."""

import sys

try:
    from tuner.cli import main
except KeyboardInterrupt:  # told to end before it began: no traceback beside the message of the rank that failed
    sys.exit(130)

main()
