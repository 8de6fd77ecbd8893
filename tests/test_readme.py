"""README and docs: links lead somewhere, commands and targets exist, no placeholder is left."""

import re
from pathlib import Path

import pytest

from vlm_dist.cli.app import COMMANDS

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name} links {target}"
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
