"""Who may import whom (design section 2), read from the source of every module."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OURS = ("vlm_dist", "feature_store", "jobs", "cluster")


def _imports(path: Path) -> set[str]:
    """Our modules that a file imports anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            assert node.module is not None
            # `from vlm_dist import errors` names a module of the package as well as the package
            names = (f"{node.module}.{alias.name}" for alias in node.names)
            found.update(names if node.module in OURS else [node.module])
    return {name for name in found if name.split(".")[0] in OURS}


def _allowed(module: str, imported: str) -> bool:
    package, target = module.split(".")[0], imported.split(".")[0]
    if package == target or imported.startswith("vlm_dist.errors"):
        return True
    if package in ("feature_store", "cluster"):
        return False
    if package == "jobs":
        return True
    if target == "feature_store":
        return True
    if imported == "cluster.config.ClusterConfig" or imported == "cluster.config":
        return module == "vlm_dist.config"  # the settings are composed of every component's model
    return module.startswith(("vlm_dist.cli", "vlm_dist.demo"))


def test_packages_import_only_what_they_may() -> None:
    wrong: list[str] = []
    modules = 0
    for package in OURS:
        for path in sorted((ROOT / package).rglob("*.py")):
            module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            modules += 1
            wrong += [f"{module} imports {name}" for name in _imports(path) if not _allowed(module, name)]
    assert wrong == []
    assert modules > 40


def test_no_module_is_called_like_a_library() -> None:
    taken = {"types", "queue", "ray", "mlflow", "torch", "zarr", "logging", "json", "random", "select", "tokenize"}
    clashes = [path for package in OURS for path in (ROOT / package).rglob("*.py") if path.stem in taken]
    assert clashes == []
