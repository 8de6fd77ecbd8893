"""feature_store.dedup: whole words once, and the reference's own rule where it is asked for."""

import ast
import json
from collections import Counter
from itertools import chain, pairwise
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from feature_store.caption_cleaning import clean_captions
from feature_store.caption_files import RawCaptions
from feature_store.dedup import Caption, deduplicate_reference, deduplicate_words


@pytest.mark.parametrize(
    ("captions", "expected"),
    [
        ([(0, 3, "now take the"), (2, 5, "eggs and beat them")], None),
        ([(0, 3, "take the onion"), (2, 5, "the onion and cut it")], [(0, 3, "take the onion"), (3, 5, "and cut it")]),
        ([(0, 2, "add the lamb to the pan"), (1, 3, "to the pan")], [(0, 3, "add the lamb to the pan")]),
        ([(0, 2, "add the"), (1, 4, "add the lamb")], [(0, 4, "add the lamb")]),
        ([(0, 2, "a b a b"), (1, 4, "a b a b c")], [(0, 4, "a b a b c")]),
        ([(0, 2, "x a b a b"), (1, 4, "a b a b c")], [(0, 2, "x a b a b"), (2, 4, "c")]),
        ([(0, 9, "one two"), (1, 4, "two three")], [(0, 9, "one two"), (1, 4, "three")]),
        ([(0, 1, "one"), (4, 5, "one two")], [(0, 5, "one two")]),
        ([(0, 1, "one two"), (4, 5, "two three")], [(0, 4, "one two"), (4, 5, "three")]),
        ([(0, 2, "a b"), (1, 3, "b c"), (2, 4, "c d")], [(0, 2, "a b"), (2, 3, "c"), (3, 4, "d")]),
        ([(0, 2, "a b c"), (2, 3, "c"), (3, 5, "c d"), (5, 7, "c d e")], [(0, 3, "a b c"), (3, 7, "d e")]),
        ([], None),
    ],
)
def test_whole_words(captions: list[tuple[float, float, str]], expected: list[tuple[float, float, str]] | None) -> None:
    given_captions = [Caption(*caption) for caption in captions]
    kept, repeats = deduplicate_words(given_captions)
    assert kept == (given_captions if expected is None else [Caption(*caption) for caption in expected])
    assert (repeats == 0) == (expected is None)


@given(st.lists(st.integers(1, 4), min_size=1, max_size=12), st.integers(2, 3), st.integers(2, 6))
def test_rolling_captions_give_every_row_once_and_lose_no_time(lengths: list[int], rows: int, shown_s: int) -> None:
    """Every two seconds a new row is added below, and those above the last two or three are gone."""
    lines = [[f"word{number}of{line}" for number in range(length)] for line, length in enumerate(lengths)]
    captions = [
        Caption(2 * k, 2 * k + shown_s, " ".join(chain(*lines[max(0, k - rows + 1) : k + 1])))
        for k in range(len(lines))
    ]
    kept, repeats = deduplicate_words(captions)
    assert " ".join(caption.text for caption in kept).split() == [*chain(*lines)]
    assert repeats == len(lines) - 1
    assert (kept[0].start, kept[-1].end) == (0, captions[-1].end)
    assert all(before.end == after.start for before, after in pairwise(kept))


words = st.lists(st.sampled_from(["cut", "the", "onion", "then", "stir"]), min_size=1, max_size=6).map(" ".join)
few_captions = st.lists(st.tuples(st.integers(0, 20), st.integers(1, 9), words), max_size=8)


@given(few_captions)
def test_no_word_is_lost_or_made_up(rows: list[tuple[int, int, str]]) -> None:
    captions = [Caption(start, start + length, text) for start, length, text in sorted(rows)]
    kept, _ = deduplicate_words(captions)
    said, told = (set(" ".join(c.text for c in some).split()) for some in (captions, kept))
    assert said == told
    assert all(caption.start < caption.end and caption.text for caption in kept)


@given(few_captions, st.sampled_from(["words", "reference", "off"]))
def test_starts_ascend_whatever_was_cut(rows: list[tuple[int, int, str]], rule: str) -> None:
    starts, ends, texts = [r[0] for r in rows], [r[0] + r[1] for r in rows], [r[2] for r in rows]
    kept = clean_captions(RawCaptions("v", starts, ends, texts), rule, Counter())
    assert all(before.start <= after.start for before, after in pairwise(kept))
    assert all(caption.start < caption.end for caption in kept)


def test_reference_rule_gives_what_the_reference_gave(shared: Path) -> None:
    cases = json.loads((shared / "golden" / "dedup.json").read_text())
    for name, case in cases.items():
        raw = case["input"]
        texts = [float("nan") if text == "nan" else text for text in raw["text"]]
        results = {seed: ast.literal_eval(text) for text, seeds in case["results_by_seed"].items() for seed in seeds}
        cleaned = clean_off(RawCaptions(name, raw["start"], raw["end"], texts))
        for seed in range(6):
            kept, _ = deduplicate_reference(cleaned, Random(seed))
            got = {"start": [c.start for c in kept], "end": [c.end for c in kept], "text": [c.text for c in kept]}
            assert got == results[seed], (name, seed)


def clean_off(raw: RawCaptions) -> list[Caption]:
    """Cleaned captions in seconds, not de-duplicated."""
    return [Caption(c.start / 1000, c.end / 1000, c.text) for c in clean_captions(raw, "off", Counter())]


def test_both_sides_of_the_coin_occur(shared: Path) -> None:
    one_letter = json.loads((shared / "golden" / "dedup.json").read_text())["one_letter"]["results_by_seed"]
    captions = [Caption(0, 3, "now take the"), Caption(2, 5, "eggs and beat them")]
    got = {tuple(c.text for c in deduplicate_reference(captions, Random(seed))[0]) for seed in range(40)}
    assert got == {tuple(ast.literal_eval(text)["text"]) for text in one_letter}
