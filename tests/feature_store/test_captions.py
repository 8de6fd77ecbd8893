"""feature_store.captions: cleaning, tokens beside their video, captions that wait, files with errors."""

import json
import math
import os
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from feature_store import caption_files
from feature_store import captions as captions_module
from feature_store.caption_files import iter_captions
from feature_store.captions import check_caption_file, write_captions
from feature_store.config import CaptionConfig
from feature_store.index import StoreIndex
from feature_store.inspection_index import wrong_captions
from feature_store.snapshot import finalise, row_milliseconds
from feature_store.tokenizer import load_tokenizer
from feature_store.verify import verify_store
from tests.feature_store.store_tools import features, make_store, write_shards
from vlm_dist.errors import ConfigError, StoreError

SMALL = CaptionConfig(tokenizer="wordpiece:120")
NARRATION = {
    "a": {"start": [0, 3.5, 8], "end": [4, 9, 12.25], "text": ["cut the onion", "the onion is cut", "stir it well"]},
    "b": {"start": [1], "end": [2], "text": ["now we wait"]},
}


def save(folder: Path, captions: dict[str, Any], name: str = "captions.json") -> Path:
    """A caption file of any form, by its ending."""
    path = folder / name
    if path.suffix == ".json":
        path.write_text(json.dumps(captions))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"video_id": i, **value}) + "\n" for i, value in captions.items()))
    else:
        rows = [
            f'{i},{start},{end},"{text}"\n'
            for i, value in captions.items()
            for start, end, text in zip(value["start"], value["end"], value["text"], strict=True)
        ]
        path.write_text("video_id,start,end,text\n" + "".join(rows))
    return path


def said(index: StoreIndex) -> dict[str, list[tuple[int, int, str]]]:
    """Captions by id."""
    clips = range(index.num_clips)
    rows = [(int(index.clip_start_ms[c]), int(index.clip_end_ms[c]), index.clip_text(c)) for c in clips]
    ptr = index.clip_ptr.tolist()
    return {index.video_id(v): rows[ptr[v] : ptr[v + 1]] for v in range(index.num_videos)}


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """A store of videos a (12 s) and b (5 s), and c without narration."""
    return make_store(tmp_path / "two", {"a": features("a", 12), "b": features("b", 5), "c": features("c", 9)})


@pytest.mark.parametrize("name", ["captions.json", "captions.jsonl", "captions.csv"])
def test_captions_beside_their_videos(tmp_path: Path, two: Path, name: str) -> None:
    report = write_captions(two, save(tmp_path, NARRATION, name), SMALL)
    index = StoreIndex(two)
    assert said(index) == {
        "a": [(0, 4000, "cut the onion"), (4000, 9000, "is cut"), (8000, 12000, "stir it well")],
        "b": [(1000, 2000, "now we wait")],
        "c": [],
    }
    assert index.tokenizer_dir is not None
    tokenizer = load_tokenizer(str(index.tokenizer_dir))
    texts = [text for rows in said(index).values() for *_, text in rows]
    assert index.tokens.tolist() == [piece for text in texts for piece in tokenizer.encode(text)]
    assert index.clip_ntok.tolist() == [len(tokenizer.encode(text)) for text in texts]
    assert index.tok_ptr.tolist()[-2:] == [index.num_tokens] * 2
    assert index.tokens.dtype == np.uint16
    assert (report.videos_with_captions, report.videos_without_captions, report.duplicates, report.clipped) == (
        2,
        1,
        1,
        1,
    )
    assert report.tokens_per_s == pytest.approx(index.num_tokens / 17)
    assert (report.clips, report.captions_per_video, report.tokenizer_sha256) == (4, 2.0, tokenizer.sha256)
    assert not verify_store(two, deep=True).problems


def test_what_cannot_be_used_is_counted(tmp_path: Path, two: Path) -> None:
    rows: list[tuple[Any, Any, Any]] = [
        (0, 1, "kept"),
        (-1, 2, "from the start"),
        (math.nan, 2, "x"),
        (1, None, "x"),
        (5, 5, "x"),
        (6, 5, "x"),
        (-4, -1, "x"),
        (3, 1e9, "x"),
        (math.inf, 1, "x"),
        (1, 2, None),
        (1, 2, math.nan),
        (1, 2, "  \n "),
        (1, 2, 7),
        (1, 2, "\u200b\x01"),
        (12, 14, "after the end"),
        (11.5, 14, "over the end"),
        ("2.5", "3", "times as text\nin two lines"),
    ]
    starts, ends, texts = map(list, zip(*rows, strict=True))
    captions = {
        "a": {"start": starts, "end": ends, "text": texts},
        "gone": NARRATION["b"],
        "empty": {"start": [], "end": [], "text": []},
    }
    report = write_captions(two, save(tmp_path, captions), SMALL)
    assert said(StoreIndex(two))["a"] == [
        (0, 1000, "kept"),
        (0, 2000, "from the start"),
        (2500, 3000, "times as text in two lines"),
        (3000, 12000, "x"),
        (11500, 12000, "over the end"),
    ]
    assert (report.dropped_text, report.dropped_times, report.dropped_outside, report.clipped) == (5, 6, 1, 3)
    assert (report.captions_without_video, report.captions_without_video_ids) == (1, ("gone",))
    assert not verify_store(two, deep=True).problems


@pytest.mark.parametrize("end", [1e7, 1e9, 1e30, math.inf])
def test_an_end_beyond_any_video_is_cut(tmp_path: Path, two: Path, end: float) -> None:
    captions = {
        "a": {"start": [10, end], "end": [end, math.inf], "text": ["to the end", "of time"]},
        "late": {"start": [0], "end": [end], "text": ["all the while"]},
    }
    report = write_captions(two, save(tmp_path, captions), SMALL)
    assert said(StoreIndex(two))["a"] == [(10_000, 12_000, "to the end")]
    assert (report.clipped, report.dropped_times, report.dropped_outside) == (1, end == math.inf, end != math.inf)
    write_shards(two, {"late": features("late", 6)})
    finalise(two)
    assert said(StoreIndex(two))["late"] == [(0, 6000, "all the while")]
    assert not verify_store(two, deep=True).problems


def test_times_that_are_no_seconds_are_suspected(tmp_path: Path, two: Path) -> None:
    write_captions(two, save(tmp_path, {"c": {"start": [0], "end": [1], "text": ["in seconds"]}}), SMALL)
    times = list(range(0, 40_000, 1000))
    captions = {"a": {"start": times, "end": [t + 900 for t in times], "text": [f"step {t}" for t in times]}}
    report = write_captions(two, save(tmp_path, captions | {"gone": captions["a"]}, "ms.json"), SMALL)
    assert (report.dropped_outside, report.perhaps_not_seconds) == (39, True)
    seconds = [t / 1000 for t in times]
    captions["a"] |= {"start": seconds, "end": [t + 0.9 for t in seconds]}
    report = write_captions(two, save(tmp_path, captions, "s.json"), SMALL)
    assert (report.dropped_outside, report.perhaps_not_seconds) == (28, False)


def test_the_text_nan_of_a_csv_is_missing(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(
        'video_id,start,end,text\na,0,1,NaN\na,1,2,"nan"\na,2,3,\na,NaN,4,null\na,4,5,Nan\n'
    )
    (raw,) = iter_captions(tmp_path / "a.csv")
    assert raw.texts == [None, None, "", "null", "Nan"]


def test_captions_wait_for_their_video(tmp_path: Path, two: Path) -> None:
    late = {"late": {"start": [0, 4, 8], "end": [3, 7, 9], "text": ["first we wait", "then it comes", "never said"]}}
    report = write_captions(two, save(tmp_path, {**NARRATION, **late}), SMALL)
    assert report.captions_without_video == 1
    before = StoreIndex(two)
    write_shards(two, {"late": features("late", 6)})
    finalise(two)
    index = StoreIndex(two)
    assert said(index)["late"] == [(0, 3000, "first we wait"), (4000, 6000, "then it comes")]
    assert {**said(index), "late": []} == {**said(before), "late": []}
    assert index.pending() is None
    assert index.fingerprint != before.fingerprint
    assert not verify_store(two, deep=True).problems


def test_captions_may_come_first(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", {})
    report = write_captions(store, save(tmp_path, NARRATION), SMALL)
    assert (report.clips, report.captions_without_video, report.tokens_per_s) == (0, 2, 0.0)
    write_shards(store, {"a": features("a", 12), "b": features("b", 5)})
    finalise(store)
    fresh = make_store(tmp_path / "fresh", {"a": features("a", 12), "b": features("b", 5)})
    write_captions(fresh, save(tmp_path, NARRATION), SMALL)
    assert said(StoreIndex(store)) == said(StoreIndex(fresh))
    assert StoreIndex(store).fingerprint == StoreIndex(fresh).fingerprint


def test_again_does_nothing(tmp_path: Path, two: Path, shared: Path) -> None:
    file = save(tmp_path, NARRATION)
    for cfg in (SMALL, CaptionConfig(tokenizer=str(shared / "golden" / "bert_tiny"))):
        first = write_captions(two, file, cfg)
        assert first.changed
        again = write_captions(two, file, cfg)
        assert again == first.model_copy(update={"changed": False})
        assert write_captions(two, None, cfg) == again


def test_a_file_that_the_store_holds_is_not_checked_again(
    tmp_path: Path, two: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, read = save(tmp_path, NARRATION), list[Path]()
    write_captions(two, file, SMALL)
    monkeypatch.setattr(captions_module, "iter_captions", lambda file, *_: read.append(file) or iter(()))
    check_caption_file(two, file, SMALL)
    assert not read
    check_caption_file(two, save(tmp_path, NARRATION, "captions.csv"), SMALL)
    assert read


def test_another_vocabulary_needs_no_file(tmp_path: Path, two: Path, shared: Path) -> None:
    file = save(tmp_path, {**NARRATION, "waits": NARRATION["b"]})
    write_captions(two, file, SMALL)
    file.unlink()
    before = StoreIndex(two)
    report = write_captions(two, None, CaptionConfig(tokenizer=str(shared / "golden" / "bert_tiny"), max_tokens=3))
    index = StoreIndex(two)
    assert said(index) == said(before)
    assert (report.tokenizer_pieces, report.captions_without_video) == (400, 1)
    assert index.clip_ntok.max() == 3
    assert index.fingerprint != before.fingerprint
    assert np.array_equal(index.crc32c, before.crc32c)
    with pytest.raises(StoreError, match="de-duplicated by 'words'; for 'off' give their file"):
        write_captions(two, None, CaptionConfig(tokenizer="wordpiece:120", deduplicate="off"))


def test_a_second_file_replaces_its_own_videos_only(tmp_path: Path, two: Path) -> None:
    write_captions(two, save(tmp_path, NARRATION), SMALL)
    other = {"b": {"start": [0], "end": [1], "text": ["nothing but salt"]}, "c": NARRATION["b"]}
    write_captions(two, save(tmp_path, other, "other.jsonl"), SMALL)
    index = StoreIndex(two)
    assert [len(rows) for rows in said(index).values()] == [3, 1, 1]
    assert said(index)["b"] == [(0, 1000, "nothing but salt")]
    tokenizer = load_tokenizer(str(index.tokenizer_dir))
    texts = [text for rows in said(index).values() for *_, text in rows]
    assert index.tokens.tolist() == [piece for text in texts for piece in tokenizer.encode(text)]


def test_a_store_keeps_its_tokenizer_until_another_is_said(tmp_path: Path, two: Path) -> None:
    first = write_captions(two, save(tmp_path, NARRATION), SMALL)
    assert not first.tokenizer_kept
    unsaid = CaptionConfig()
    assert write_captions(two, None, unsaid) == first.model_copy(update={"changed": False, "tokenizer_kept": True})
    other = save(tmp_path, {"c": {"start": [0], "end": [1], "text": ["unheard of before"]}}, "other.json")
    check_caption_file(two, other, unsaid)
    second = write_captions(two, other, unsaid)
    assert (second.changed, second.tokenizer_kept) == (True, True)
    assert (second.clips, second.tokenizer_sha256) == (first.clips + 1, first.tokenizer_sha256)
    assert StoreIndex(two).details["captions"]["config"]["tokenizer"] == SMALL.tokenizer
    said_so = write_captions(two, None, CaptionConfig(tokenizer="wordpiece:90"))
    assert (said_so.changed, said_so.tokenizer_kept) == (True, False)
    assert said_so.tokenizer_sha256 != first.tokenizer_sha256


def test_ids_of_a_file_are_not_taken_for_those_of_the_store(tmp_path: Path, two: Path) -> None:
    write_captions(two, save(tmp_path, NARRATION), SMALL)
    file = tmp_path / "ids.pkl"
    file.write_bytes(pickle.dumps({"c": {"start": [0], "end": [1], "cap": [[5, 6]]}}))
    with pytest.raises(ConfigError, match="holds word-piece ids: give the tokenizer that made them"):
        write_captions(two, file, CaptionConfig(), allow_pickle=True)


def test_cuts(tmp_path: Path, two: Path, shared: Path) -> None:
    text = "onion " * 60
    file = save(tmp_path, {"a": {"start": [0], "end": [5], "text": [text]}})
    name = str(shared / "golden" / "bert_tiny")
    tokenizer = load_tokenizer(name)
    report = write_captions(two, file, CaptionConfig(tokenizer=name, deduplicate="off", max_chars=20, max_tokens=1000))
    assert report.cut == 1
    index = StoreIndex(two)
    assert index.tokens.tolist() == tokenizer.encode(text[:20])
    assert index.clip_text(0) == text.strip()
    write_captions(two, None, CaptionConfig(tokenizer=name, deduplicate="off", max_tokens=7))
    assert StoreIndex(two).tokens.tolist() == tokenizer.encode(text[:96])[:7]
    whole = CaptionConfig(tokenizer=name, deduplicate="off", max_chars=400, max_tokens=len(tokenizer.encode(text)))
    assert write_captions(two, None, whole.model_copy(update={"max_tokens": whole.max_tokens - 1})).cut == 1
    assert write_captions(two, None, whole).cut == 0


def test_the_switch_of_the_rule(tmp_path: Path, two: Path) -> None:
    captions = {"a": {"start": [0, 2], "end": [3, 5], "text": ["now take the", "eggs and beat them"]}}
    texts = {}
    for rule in ("words", "reference", "off"):
        cfg = CaptionConfig(tokenizer="wordpiece:80", deduplicate=rule)
        write_captions(two, save(tmp_path, captions), cfg)
        texts[rule] = [text for *_, text in said(StoreIndex(two))["a"]]
    assert texts["words"] == texts["off"] == captions["a"]["text"]
    assert texts["reference"] in (["now take th", "eggs and beat them"], ["now take the", "ggs and beat them"])


def test_writers_of_captions_and_features_at_once(tmp_path: Path, two: Path) -> None:
    files = [save(tmp_path, {f"x{k}": NARRATION["b"]}, f"{k}.json") for k in range(4)]
    write_shards(two, {f"x{k}": features(f"x{k}", 5) for k in range(4)})
    with ThreadPoolExecutor(5) as pool:
        jobs = [pool.submit(write_captions, two, file, SMALL) for file in files]
        jobs.append(pool.submit(finalise, two))
        assert all(job.result() for job in jobs)
    found = said(StoreIndex(two))
    assert {video_id: len(rows) for video_id, rows in found.items()} == {
        video_id: int("x" in video_id) for video_id in found
    }
    assert list(found) == ["a", "b", "c", "x0", "x1", "x2", "x3"]
    assert not verify_store(two, deep=True).problems


def test_real_captions(shared: Path, tmp_path: Path) -> None:
    file = shared / "data" / "videos" / "captions.json"
    captions = json.loads(file.read_text())
    store = make_store(tmp_path / "real", {video_id: features(video_id, 18) for video_id in captions})
    report = write_captions(store, file, CaptionConfig(tokenizer=str(shared / "golden" / "bert_tiny")))
    assert (report.videos_with_captions, report.dropped_text, report.dropped_times) == (len(captions), 0, 0)
    assert report.clips + report.dropped_outside <= sum(len(value["text"]) for value in captions.values())
    assert report.tokens > report.clips


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", '{"v1": {"start": [0], "end": [1], "text": ["x"]}, "v2": {"start": [0]', "captions of video v2"),
        ("a.json", '{"v1": {"start": [0], "end": [1], "text": ["x"]} "v2": {}}', ", or } after video v1"),
        ("a.json", "hello", "no { after the beginning"),
        ("a.json", "", "no { after the beginning"),
        ("a.json", '{"v7": {"start": [0], "end": [1]}}', "captions of video v7 have no list 'text'"),
        ("a.json", '{"v7": [1, 2]}', "captions of video v7 are not an object"),
        ("a.json", '{"v7": {"start": [0], "end": [1], "text": ["x", "y"]}}', "v7 has 1 starts, 1 ends and 2 texts"),
        (
            "a.json",
            '{"v7": {"start": ["soon"], "end": [1], "text": ["x"]}}',
            "video v7: 'soon' is not a time in seconds",
        ),
        ("a.json", '{"video_id": "v1", "start": [], "end": [], "text": []}', r"name it \.jsonl"),
        ("a.json", '{"v1": {"start": [], "end": [], "text": []}, "v1": {}}', "captions of video v1 have no list"),
        ("a.jsonl", '{"video_id": "v1", "start": [], "end": [], "text": []}\nnope\n', "line 2 is not JSON"),
        ("a.jsonl", '{"id": "v1"}\n', "line 1 has no video_id"),
        ("a.csv", "video_id,start,text\n", "has no column end"),
        ("a.csv", "video_id,start,end,text\na,0,1,x\nb,0,1,x\na,2,3,x\n", "video a occurs twice"),
        ("a.csv", "video_id,start,end,text\na,zero,1,x\n", "video a: 'zero' is not a time"),
        ("a.csv", "video_id,start,end,text\na,0,1,hello, world\n", "line 2 has more fields than columns; quote"),
        ("a.csv", "start,end,text,video_id\n0,1,hello\n", "line 2 has fewer fields than columns"),
        ("a.csv", "video_id,start,end,text\na,0,1,x\n\nb,0\n", "line 4 has fewer fields than columns"),
        ("a.csv", '"video_id,start,end,text\na,0,1,x\n', "line 2: unexpected end of data; quote"),
        (
            "a.json",
            '{"v1": {"start": [], "end": [], "text": []}} {"v2": {}}',
            r"after its closing brace.* name it \.jsonl",
        ),
        ("a.json", "{} rest", "goes on after its closing brace"),
        ("a.json", '{"v7": {"start": [0], "end": [' + "9" * 5000 + '], "text": ["x"]}}', "captions of video v7"),
        ("a.json", '{"v7": {"start": [0], "end": [' + "9" * 400 + '], "text": ["x"]}}', "video v7: 999.* not a time"),
        ("a.json", '{"v7": ' + "[" * 100_000, "captions of video v7 after the beginning .*recursion"),
        ("a.json", '{"v7": {"text": ["' + "x" * 3_000_000, "captions of video v7 .*Unterminated string"),
        ("a.jsonl", '{"video_id": "v1", "start": [' + "9" * 5000 + "]}", "line 1 is not JSON .*digits"),
        ("a.jsonl", "\n" + "[" * 100_000, "line 2 is not JSON .*recursion"),
    ],
)
def test_files_with_errors_name_the_video(tmp_path: Path, two: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(StoreError, match=message):
        check_caption_file(tmp_path / "no store yet", tmp_path / name, SMALL)
    with pytest.raises(StoreError, match=message):
        write_captions(two, tmp_path / name, SMALL)
    assert StoreIndex(two).tokenizer_dir is None
    assert not list((two / "_staging").iterdir())


def test_a_caption_may_be_longer_than_what_is_read_at_once(tmp_path: Path) -> None:
    text = "pour and stir " * 300_000
    save(tmp_path, {"a": {"start": [0, 9], "end": [9, 10], "text": [text, "x"]}, "b": NARRATION["b"]})
    assert [raw.texts for raw in iter_captions(tmp_path / "captions.json")] == [[text, "x"], ["now we wait"]]


@pytest.mark.parametrize("pieces", [120, 110])  # the same tokenizer, and another
def test_captions_that_were_taken_out_do_not_come_back(tmp_path: Path, two: Path, pieces: int) -> None:
    waiting = {"waits": NARRATION["b"], "goes": NARRATION["b"]}
    write_captions(two, save(tmp_path, {**NARRATION, **waiting}), SMALL)
    shutil.copytree(StoreIndex(two).tokenizer_dir or two, tmp_path / "tokenizer")
    tokenizer = str(tmp_path / "tokenizer") if pieces == 120 else f"wordpiece:{pieces}"
    none, unusable = {"start": [], "end": [], "text": []}, {"start": [5], "end": [4], "text": ["backwards"]}
    file = save(tmp_path, {"a": none, "b": unusable, "goes": none}, "less.json")
    report = write_captions(two, file, CaptionConfig(tokenizer=tokenizer))
    assert said(StoreIndex(two)) == {"a": [], "b": [], "c": []}
    assert report.captions_without_video_ids == ("waits",)
    assert not verify_store(two, deep=True).problems


def test_wrong_usage(tmp_path: Path, two: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.json is not there; give raw_caption\.json"):
        write_captions(two, tmp_path / "none.json", SMALL)
    os.mkfifo(tmp_path / "pipe.json")
    for name, what in (("pipe.json", "is no plain file"), (".", "is a folder")):
        with pytest.raises(ConfigError, match=f"{what}.*; give raw_caption"):
            write_captions(two, tmp_path / name, SMALL)
    (tmp_path / "semicolons.csv").write_text("video_id;start;end;text\na;0;1;cut it\n")
    with pytest.raises(StoreError, match=r"no column end, start, text, video_id; .* separated by commas"):
        write_captions(two, tmp_path / "semicolons.csv", SMALL)
    (tmp_path / "captions.txt").touch()
    with pytest.raises(ConfigError, match=r"ending '\.txt' is not known; give raw_caption\.json"):
        write_captions(two, tmp_path / "captions.txt", SMALL)
    with pytest.raises(ConfigError, match="wordpiece:many: give wordpiece:N"):
        write_captions(two, save(tmp_path, NARRATION), CaptionConfig(tokenizer="wordpiece:many"))
    with pytest.raises(StoreError, match="no captions yet"):
        write_captions(two, None, SMALL)
    (tmp_path / "latin.json").write_bytes(b'{"v\xe9": {}}')
    with pytest.raises(StoreError, match="not UTF-8"):
        write_captions(two, tmp_path / "latin.json", SMALL)


@pytest.mark.parametrize("block", [1, 7, 64, 1 << 20])
@pytest.mark.parametrize("indent", [None, 2])
def test_json_is_read_in_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int, indent: int | None
) -> None:
    captions = {f'v{"x" * k}"é\\': {"start": [k], "end": [k + 1.5], "text": ['say "hi" {}[],: ' * k]} for k in range(9)}
    captions["last"] = {"start": [1e3], "end": [12345], "text": [None]}
    path = tmp_path / "captions.json"
    path.write_text(json.dumps(captions, indent=indent))
    monkeypatch.setattr(caption_files, "_BLOCK", block)
    found = {raw.video_id: {"start": raw.starts, "end": raw.ends, "text": raw.texts} for raw in iter_captions(path)}
    assert found == captions
    path.write_text(" {\n} ")
    assert list(iter_captions(path)) == []


times = st.one_of(st.floats(-5, 40), st.just(math.nan), st.none())
lines = st.one_of(st.text(max_size=30), st.none(), st.just("cut the onion"), st.just("the onion is cut"))


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    captions=st.dictionaries(
        st.sampled_from("abcxyz"), st.lists(st.tuples(times, times, lines), max_size=6), max_size=6
    ),
    rule=st.sampled_from(["words", "reference", "off"]),
)
def test_any_captions_give_a_sound_index(
    two: Path, tmp_path: Path, captions: dict[str, list[tuple[Any, Any, Any]]], rule: Any
) -> None:
    """Whatever a file says: starts ascend, start < end <= length, crcs hold, and nothing usable is uncounted."""
    columns = {
        i: dict(zip(("start", "end", "text"), map(list, zip(*rows, strict=True)), strict=False))
        for i, rows in captions.items()
        if rows
    }
    report = write_captions(two, save(tmp_path, columns), CaptionConfig(tokenizer="wordpiece:2000", deduplicate=rule))
    index = StoreIndex(two)
    assert index.captions is not None
    limits = index.n_rows.astype(np.int64) * row_milliseconds(index.meta)
    assert wrong_captions(index.captions, index.num_videos, limits, report.tokenizer_pieces) == ""
    for video in range(index.num_videos):
        assert (np.diff(index.check_captions(video).start_ms.astype(np.int64)) >= 0).all()
    assert (index.clip_ntok > 0).all()
