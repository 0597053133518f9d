"""python -m titans_pytorch.cli COMMAND ...: the same as `titans COMMAND ...`."""

import sys

from titans_pytorch.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
