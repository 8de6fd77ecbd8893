"""Whether this project computes what the paper's reference implementation did: largest differences, in one table.

    python benchmarks/parity.py DIR

DIR holds recordings of the reference, named as in `parity_bench/checks.py`; each that is there is checked through this
project's public functions, in float32 on the CPU. What it cannot compute yet is listed, and does not count. Exit code 1
where anything differs by more than is allowed, or nothing is there.
"""

import sys
from pathlib import Path

from parity_bench.checks import CHECKS, Difference


def main() -> None:
    """Check, and print the table."""
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_dir():
        raise SystemExit("which folder of recordings? python benchmarks/parity.py DIR")
    folder = Path(sys.argv[1])
    found = [name for name in CHECKS if (folder / name).is_file()]
    if not found:
        raise SystemExit(f"{folder} holds none of {', '.join(CHECKS)}")
    differences = [difference for name in found for difference in CHECKS[name](folder)]
    print("| file | what | largest difference | allowed | fits |\n|---|---|---|---|---|")
    for difference in differences:
        print(_row(difference))
    if not any(difference.largest is not None for difference in differences):
        raise SystemExit("nothing was compared")
    if wrong := [difference for difference in differences if not difference.fits]:
        raise SystemExit(f"{len(wrong)} of {len(differences)} differ by more than is allowed")


def _row(it: Difference) -> str:
    if it.largest is None:
        return f"| {it.file} | {it.what} | | | not built yet |"
    return f"| {it.file} | {it.what} | {it.largest:.1e} | {it.allowed:.0e} | {'yes' if it.fits else 'NO'} |"


if __name__ == "__main__":
    main()
