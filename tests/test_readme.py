"""README and docs: links lead somewhere; commands, options, targets and settings exist; no placeholder is left."""

import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from pydantic import BaseModel

from vlm_dist.cli.app import COMMANDS
from vlm_dist.config import Settings, fields, pattern

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "benchmarks" / "README.md"])
SECTIONS = [name for name, field in Settings.model_fields.items()
            if name == "data" or isinstance(field.default, BaseModel)]  # fmt: skip
_SETTING = re.compile(rf"`(?:--set )?((?:{'|'.join(SECTIONS)})(?:\.[a-zA-Z_-]+)+)(?=[ `=])(?: ?= ?([^`]*))?")
_FILE = re.compile(r"\.(py|md|toml|json|parquet)$")


def _known(key: str) -> bool:
    return pattern(key.replace(".TASK.", ".coin.")) is not None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_settings_exist(page: Path) -> None:
    named = [key for key, _ in _SETTING.findall(page.read_text()) if not _FILE.search(key)]
    assert [key for key in named if not _known(key)] == []


def test_every_choice_between_paper_and_code_exists() -> None:
    rows = [line for line in (ROOT / "docs" / "paper-and-code.md").read_text().splitlines() if line.startswith("| ")]
    chosen = [(key, values) for row in rows for key, values in _SETTING.findall(row.split("|")[-2])]
    assert len(chosen) > 12
    for key, values in chosen:
        for value in re.findall(r'"([^"]+)"', values):
            allowed = str(fields()[pattern(key.replace("data.coin", "data.*")) or key].annotation)
            assert f"'{value}'" in allowed, (key, value)


@cache
def _help(*words: str) -> str:
    done = subprocess.run([sys.executable, "-m", "vlm_dist", *words, "--help"], capture_output=True, text=True)
    return done.stdout


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_have_the_options_that_are_shown(page: Path) -> None:
    for line in re.findall(r"(?m)^vlm-dist ([^#\n]*--[^#\n]*)", page.read_text()):
        words = line.split()
        depth = 2 if words[0] in ("store", "checkpoint", "jobs", "config") else 1
        shown = {word.split("=")[0] for word in words if re.match("--[a-z]", word)}
        assert [name for name in sorted(shown) if name not in _help(*words[:depth])] == [], line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text()
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", text):
        file = (page.parent / target).resolve() if target else page
        assert file.exists(), f"{page.name} links {target}"
        if anchor:
            heads = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads], target
    assert not re.search(r"\b[A-Z]+_OUTPUT\b|TODO|TBD", text)


def test_commands_in_the_readme_exist() -> None:
    blocks = "".join(re.findall(r"```\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL))
    typed = re.findall(r"^ *vlm-dist ([a-z]+)", blocks, re.MULTILINE)
    assert len(typed) > 8
    assert set(typed) <= set(COMMANDS)


def test_make_targets_in_the_pages_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in PAGES:
        assert set(re.findall(r"(?:^|`)make ([a-z]+)", page.read_text(), re.MULTILINE)) <= targets, page.name
