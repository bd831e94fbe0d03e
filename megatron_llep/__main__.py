"""`python -m megatron_llep`."""

import sys

from megatron_llep.offline.cli import main

if __name__ == "__main__":
    sys.exit(main())
