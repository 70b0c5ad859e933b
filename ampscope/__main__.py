"""python -m ampscope: the same as the command ampscope."""

import sys

from ampscope.cli import main

if __name__ == "__main__":
    sys.exit(main())
