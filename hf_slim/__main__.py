"""`python -m hf_slim`, and `accelerate launch -m hf_slim`."""

import sys

from hf_slim.cli import main

if __name__ == "__main__":
    sys.exit(main())
