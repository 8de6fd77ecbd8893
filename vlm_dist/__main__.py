"""`vlm-dist` and `python -P -m vlm_dist`."""

import sys

from vlm_dist.cli.app import main

if __name__ == "__main__":
    sys.exit(main())
