"""The one table of the benchmark: a row for each comparison, and the line that says where it was measured."""

import datetime
import importlib.metadata
import platform
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import psutil


@dataclass(frozen=True)
class Row:
    """One comparison. A ratio above 1 is ours ahead; `met` is None where nothing was promised."""

    section: str
    what: str
    unit: str
    ours: float
    alternative: str
    theirs: float | None
    ratio: float | None
    goal: str = ""
    met: bool | None = None


def compare(
    section: str, what: str, unit: str, ours: list[float], alternative: str, theirs: list[float], goal: float | None
) -> Row:
    """Rates of ours and of an alternative, measured in alternating rounds; a goal is a least ratio of their medians."""
    ratio = median(ours) / median(theirs)
    told, met = (f">= {goal:g} x", ratio >= goal) if goal else ("", None)
    return Row(section, what, unit, median(ours), alternative, median(theirs), ratio, told, met)


def bound(
    section: str,
    what: str,
    unit: str,
    ours: list[float],
    goal: float,
    alternative: str = "",
    theirs: list[float] | None = None,
    most: bool = False,
) -> Row:
    """A figure with a goal of its own, a least value or (most) a greatest one; an alternative is told beside it."""
    value, other = median(ours), median(theirs) if theirs else None
    ratio = None if other is None else (other / max(value, 1e-9) if most else value / other)
    met = value < goal if most else value >= goal
    return Row(section, what, unit, value, alternative, other, ratio, f"{'<' if most else '>='} {goal:,}", met)


def render(rows: list[Row]) -> str:
    """The table as text."""
    head = ("section", "what", "ours", "alternative", "theirs", "ratio", "goal", "met")
    lines = [head]
    for row in rows:
        theirs, ratio = ("" if v is None else _number(v) for v in (row.theirs, row.ratio))
        met = {True: "yes", False: "NO", None: ""}[row.met]
        ours = f"{_number(row.ours)} {row.unit}"
        lines.append((row.section, row.what, ours, row.alternative, theirs, ratio, row.goal, met))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    right = {2, 4, 5}
    text = [
        "  ".join(
            cell.rjust(w) if k in right else cell.ljust(w) for k, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    text.insert(1, "  ".join("-" * w for w in widths))
    return "\n".join(line.rstrip() for line in text)


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:,.1f}" if abs(value) >= 10 else f"{value:,.2f}"


def machine() -> str:
    """Processor, cores, memory, Python, date and load."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.split(":", 1)[1].strip() for line in info.splitlines() if line.startswith("model name")]
    processor = names[0] if names else platform.processor() or platform.machine()
    memory = psutil.virtual_memory().total / 2**30
    load = psutil.getloadavg()[0]
    return (
        f"{processor}, {psutil.cpu_count()} cores, {memory:.0f} GiB, {platform.system()} {platform.release()}, "
        f"Python {platform.python_version()}, {datetime.date.today()}, load {load:.1f}"
    )


def versions(figures: dict[str, Any]) -> str:
    """Versions of what was measured, the peers' as their own environment has them."""
    found = {name: importlib.metadata.version(name) for name in ("vlm-dist", "numpy", "zarr", "tensorstore", "torch")}
    for section in ("page-cache", "tmpfs"):
        found |= figures.get(section, {}).get("peers", {})
    return ", ".join(f"{name} {version}" for name, version in found.items())
