"""The environment of the formats whose requirements clash with ours: made once, in a folder that git ignores."""

import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / ".bench" / "peers"
TORCH = "torch==2.13.0"  # as our own: whichever build pip has at hand, and never another beside it
PACKAGES = [
    *("numpy==2.1.3", "h5py==3.16.0", "lmdb==3.0.0", "transformers==4.57.6", "xxhash==3.8.2"),
    *("brotli", "python-snappy", "zstd", "catalogue", "pillow", "lightning-utilities", "boto3"),
]
# Their own lists ask for cloud clients and for torchvision, which brings a CUDA torch; reading local files needs none.
ALONE = ["mosaicml-streaming==0.13.0", "litdata==0.2.76"]


def peers_python(make: bool) -> Path | None:
    """The peers' interpreter; None where there is none and none is to be made."""
    python, done = FOLDER / "bin" / "python", FOLDER / "complete"
    if make and not done.exists():
        print(f"making {FOLDER.relative_to(ROOT)} (1.3 GB with a CPU build of torch)", file=sys.stderr)
        venv.create(FOLDER, with_pip=True, clear=True)
        with tempfile.NamedTemporaryFile("w", suffix=".txt") as constraints:
            constraints.write(f"{TORCH}\n")
            constraints.flush()
            for what in ([TORCH], [*PACKAGES, "--constraint", constraints.name], ["--no-deps", *ALONE]):
                command = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *what]
                subprocess.run(command, check=True)
        done.touch()
    return python if done.exists() else None
