import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vlm_dist.data.records import HELD_OUT, TEST, TRAIN
from vlm_dist.data.splits import read_id_list
from vlm_dist.errors import TaskDataError
from vlm_dist.tasks.annotations import read_clip_list, read_steps

GOOD = {"video_id": "a", "start": 1.5, "end": 4, "text": "whisk the eggs", "split": "train"}


def clip_file(folder: Path, *records: Any) -> Path:
    file = folder / "clips.jsonl"
    file.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in records) + "\n")
    return file


def coin_file(folder: Path, database: Any) -> Path:
    file = folder / "COIN.json"
    file.write_text(database if isinstance(database, str) else json.dumps({"database": database}))
    return file


def coin_video(*segments: tuple[float, float, Any], subset: str = "training") -> dict[str, Any]:
    steps = [{"id": label, "label": f"step {label}", "segment": [s, e]} for s, e, label in segments]
    return {"subset": subset, "annotation": steps}


def test_clip_list(tmp_path: Path) -> None:
    whole = {"video_id": "ü/b", "text": "all of it", "split": "test"}
    clips = read_clip_list(clip_file(tmp_path, GOOD, "", whole, GOOD | {"split": "val"}))
    assert clips.video_ids == ["a", "ü/b", "a"]
    assert clips.texts[1] == "all of it"
    np.testing.assert_array_equal(clips.start, [1.5, np.nan, 1.5])
    np.testing.assert_array_equal(clips.end, [4, np.nan, 4])
    assert clips.split.tolist() == [TRAIN, TEST, HELD_OUT]
    assert clips.lines.tolist() == [1, 3, 4]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"start": 5}, "start 5 s must be at least 0 and below the end 4 s"),
        ({"start": -1}, "at least 0"),
        ({"start": float("nan")}, "not a start and an end"),
        ({"start": "1"}, "not a start and an end"),
        ({"end": None}, "come together"),
        ({"text": float("nan")}, "text is nan, not a text"),
        ({"text": "  "}, "not a text"),
        ({"video_id": 7}, "video_id is 7"),
        ({"split": "dev"}, "split is 'dev', not one of train"),
    ],
)
def test_a_bad_clip_names_file_line_and_schema(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    with pytest.raises(TaskDataError, match=r"clips\.jsonl") as caught:
        read_clip_list(clip_file(tmp_path, GOOD, GOOD | change))
    assert "line 2: " in str(caught.value)
    assert said in str(caught.value)
    assert '"video_id": str' in str(caught.value)


def test_bad_lines_are_all_counted(tmp_path: Path) -> None:
    with pytest.raises(TaskDataError, match="line 1: not JSON") as caught:
        read_clip_list(clip_file(tmp_path, "{", "[1]", *["x"] * 7))
    assert "line 2: not a JSON object" in str(caught.value)
    assert "and 4 more" in str(caught.value)


def test_absent_and_empty_files(tmp_path: Path) -> None:
    with pytest.raises(TaskDataError, match="is not there; this task needs a clip list"):
        read_clip_list(tmp_path / "nothing.jsonl")
    with pytest.raises(TaskDataError, match="is a folder"):
        read_steps(tmp_path)
    with pytest.raises(TaskDataError, match="no clips in it"):
        read_clip_list(clip_file(tmp_path))


@pytest.mark.parametrize("separator", [",", ";"])
def test_msrvtt_form(tmp_path: Path, separator: str) -> None:
    file = tmp_path / "list.csv"
    rows = [("key", "vid_key", "video_id", "sentence"), ("ret0", "msr1", "video1", "a man sings")]
    rows += [("ret1", "msr2", "video2", f'"one{separator} two"')]
    file.write_text("\ufeff" + "\r\n".join(separator.join(row) for row in rows), encoding="utf-8")
    clips = read_clip_list(file)
    assert clips.video_ids == ["video1", "video2"]
    assert clips.texts == ["a man sings", f"one{separator} two"]
    assert clips.split.tolist() == [TEST, TEST]
    assert clips.lines.tolist() == [2, 3]
    assert np.isnan(clips.start).all()


def test_bad_tables(tmp_path: Path) -> None:
    file = tmp_path / "list.csv"
    file.write_text("id,caption\n1,x\n")
    with pytest.raises(TaskDataError, match=r"columns id, caption\n.*video_id and sentence"):
        read_clip_list(file)
    file.write_text("video_id,sentence\nv1,a man, a dog\n")
    with pytest.raises(TaskDataError, match="line 2: 3 fields where the header has 2"):
        read_clip_list(file)
    file.write_bytes(b"video_id,sentence\nv1,\xff\xfe\n")
    with pytest.raises(TaskDataError, match="no UTF-8 text"):
        read_clip_list(file)


def test_real_msrvtt_list(shared: Path) -> None:
    clips = read_clip_list(shared / "data" / "msrvtt" / "MSRVTT_JSFUSION_test.csv")
    assert len(clips.video_ids) == len(set(clips.video_ids)) == 1000
    assert clips.video_ids[0] == "video9770"
    assert clips.texts[0] == "a person is connecting something to system"
    assert (clips.split == TEST).all()


def test_coin_form_plain_and_gzipped(tmp_path: Path) -> None:
    database = {"a": coin_video((0, 2.5, "3"), (2, 4, 1)), "b": coin_video(subset="testing")}
    plain = coin_file(tmp_path, database)
    packed = tmp_path / "COIN.json.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    for file in (plain, packed):
        steps = read_steps(file)
        assert steps.video_ids == ["a", "b"]
        assert steps.split.tolist() == [TRAIN, TEST]
        assert steps.segment_video.tolist() == [0, 0]
        assert steps.start.tolist() == [0, 2]
        assert steps.end.tolist() == [2.5, 4]
        assert steps.label.tolist() == [3, 1]
        assert steps.class_names == {1: "step 1", 3: "step 3"}


@pytest.mark.parametrize(
    ("database", "said"),
    [
        ({"a": coin_video((3, 2, "1"))}, "video a: start 3 s must be"),
        ({"a": coin_video((1, 2, "0"))}, "label id '0' is not a whole number from 1"),
        ({"a": coin_video((1, 2, "x"))}, "label id 'x'"),
        ({"a": coin_video((1, 2, True))}, "label id True"),
        ({"a": coin_video(subset="dev")}, "subset is 'dev'"),
        ({"a": {"subset": "training"}}, "no list `annotation`"),
        ({"a": 3}, "video a: not an object"),
        ({}, "no videos under the key `database`"),
        ("not json", "not readable as JSON"),
        ('{"database": {"a": 1, "a": 2}}', "'a' occurs twice"),
    ],
)
def test_bad_steps_name_the_video_and_the_schema(tmp_path: Path, database: Any, said: str) -> None:
    with pytest.raises(TaskDataError, match=r"COIN\.json") as caught:
        read_steps(coin_file(tmp_path, database))
    assert said in str(caught.value)
    assert '"subset": "training" | "testing"' in str(caught.value)


@pytest.mark.parametrize("damage", [lambda raw: raw[:-9], lambda raw: raw[:30] + b"\xff" * 9 + raw[39:]])
def test_a_damaged_gzip_file_is_named(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    file = tmp_path / "COIN.json.gz"
    file.write_bytes(damage(gzip.compress(b'{"database": {}}' * 100)))
    for read in (read_steps, read_id_list):
        with pytest.raises(TaskDataError, match="cannot be read"):
            read(file)


def test_one_reader_for_lists_and_annotations(tmp_path: Path) -> None:
    """Whatever file a task takes, the check for seen test videos and the exclusion from pre-training take as well."""
    mark = "\ufeff".encode()
    table = mark + b"video_id,sentence,split\nv1,hello,Train\nv2,there,TEST\n"
    lines = mark + (json.dumps(GOOD) + "\n" + json.dumps(GOOD | {"video_id": "v2", "split": "test"})).encode()
    coin = mark + json.dumps({"database": {"v1": coin_video((0, 2, 1)), "v2": coin_video(subset="testing")}}).encode()
    files = {"a.csv": table, "b.CSV": table, "a.ndjson": lines, "a.JSONL": lines, "COIN.JSON": coin}
    for name, raw in files.items():
        for path, content in ((tmp_path / name, raw), (tmp_path / f"{name}.gz", gzip.compress(raw)),
                              (tmp_path / f"packed_{name}", gzip.compress(raw))):  # fmt: skip
            path.write_bytes(content)
            read = read_steps if "COIN" in name else read_clip_list
            assert read(path).video_ids[1] == "v2", path
            assert read(path).split.tolist() == [TRAIN, TEST]
            assert read_id_list(path) == {"v2"}, path
            assert len(read_id_list(path, left_out=())) == 2
    held = clip_file(tmp_path, GOOD | {"video_id": "h", "split": "val"}, GOOD | {"split": "test"})
    assert read_id_list(held, left_out=(TRAIN, HELD_OUT)) == {"a"}


@pytest.mark.parametrize("value", [None, 7, "", "  "])
def test_a_video_id_that_is_no_text_is_refused_by_every_reader(tmp_path: Path, value: Any) -> None:
    file = clip_file(tmp_path, GOOD, GOOD | {"video_id": value})
    for read in (read_clip_list, read_id_list):
        with pytest.raises(TaskDataError, match="line 2: video_id is"):
            read(file)


def test_files_of_another_kind_are_refused(tmp_path: Path) -> None:
    coin = coin_file(tmp_path, {"a": coin_video((0, 2, 1))})
    with pytest.raises(TaskDataError, match="this task needs a clip list"):
        read_clip_list(coin)
    with pytest.raises(TaskDataError, match="step annotations"):
        read_steps(clip_file(tmp_path, GOOD))
    (tmp_path / "x.pkl").write_bytes(b"x")
    with pytest.raises(TaskDataError, match=r"the ending '\.pkl' is not known"):
        read_clip_list(tmp_path / "x.pkl")


def test_real_coin(shared: Path) -> None:
    steps = read_steps(shared / "data" / "coin" / "COIN.json.gz")
    assert len(steps.video_ids) == 10070
    assert np.bincount(steps.split).tolist() == [7064, 0, 3006]
    assert len(steps.label) == 39409
    assert len(steps.class_names) == 768
    assert steps.label.max() == 778
    assert steps.class_names[373] == "begin to run up"
