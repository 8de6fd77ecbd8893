"""Whether the packages that are imported under our four names are ours (`jobs` and `cluster` are generic names)."""

import importlib.util
from pathlib import Path

from vlm_dist.errors import ConfigError

OURS = ("vlm_dist", "feature_store", "jobs", "cluster")
_CURE = "install vlm-dist in an environment of its own: `python -m venv NEW && NEW/bin/pip install vlm-dist`"


def check_packages() -> Path:
    """The folder that all four packages are imported from; takes about a millisecond.

    Raises:
        ConfigError: One of them comes from elsewhere.
    """
    homes = {name: _home(name) for name in OURS}
    home = homes["vlm_dist"]
    for name, other in homes.items():
        if other != home:
            where = f"at {other}" if other else "it is not there at all"
            raise ConfigError(f"another distribution owns the package `{name}` ({where}; ours are in {home}); {_CURE}")
    assert home is not None, "this very module was imported from it"
    return home


def check_owners() -> None:
    """The same for packages in one folder, where another distribution has overwritten files; reads all metadata.

    Raises:
        ConfigError: Another distribution claims one of the names (PyPI has a `cluster`).
    """
    from importlib.metadata import packages_distributions

    for name, owners in packages_distributions().items():
        others = sorted(set(owners) - {"vlm-dist"})
        if name in OURS and others:
            raise ConfigError(f"another distribution owns the package `{name}`: {', '.join(others)}; {_CURE}")


def _home(package: str) -> Path | None:
    spec = importlib.util.find_spec(package)
    places = list(spec.submodule_search_locations or ()) if spec else []
    return Path(places[0]).resolve().parent if places else None
