"""How long `vlm-dist --help` takes, beside an empty Python and beside importing the libraries that it must not import.

    python benchmarks/cli_start.py

Medians over interleaved runs, whole processes. Goal (design section 2): under half a second.
"""

import platform
import statistics
import subprocess
import sys
import time

RUNS = 9
COMMANDS = {
    "python -c pass": [sys.executable, "-c", "pass"],
    "vlm-dist --help": [sys.executable, "-m", "vlm_dist", "--help"],
    "vlm-dist pretrain --help": [sys.executable, "-m", "vlm_dist", "pretrain", "--help"],
    "import torch": [sys.executable, "-c", "import torch"],
    "import torch, ray, mlflow": [sys.executable, "-c", "import torch, ray, mlflow"],
}


def main() -> None:
    """Print one row a command."""
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(RUNS):
        for name, command in COMMANDS.items():
            start = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True)
            seconds[name].append(time.perf_counter() - start)
    base = statistics.median(seconds["import torch, ray, mlflow"])
    print(f"{platform.processor() or platform.machine()}, Python {platform.python_version()}, {RUNS} runs each")
    print(f"{'command':28}{'median s':>10}{'min':>8}{'max':>8}{'of importing all':>18}")
    for name, values in seconds.items():
        median = statistics.median(values)
        print(f"{name:28}{median:>10.3f}{min(values):>8.3f}{max(values):>8.3f}{median / base:>17.1%}")


if __name__ == "__main__":
    main()
