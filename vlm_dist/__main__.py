"""`vlm-dist` and `python -P -m vlm_dist`."""

import sys


def main() -> int:
    """As `vlm_dist.cli.app.main`, and Ctrl-C may come while that is still being imported."""
    try:
        from vlm_dist.cli.app import main as run

        return run()
    except KeyboardInterrupt:
        from vlm_dist.cli.output import print_interrupted

        return print_interrupted()


if __name__ == "__main__":
    sys.exit(main())
