"""`python -m fnn`: the command `fnn` where its script is not on the path."""

import sys

from fnn.cli import main

if __name__ == "__main__":
    sys.exit(main())
