"""Sealed files that lie where they do not belong, of this store or of another: a repair loses nothing that is good."""

import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from feature_store.local_storage import LocalStorage
from feature_store.marks import delete_videos, name_split
from feature_store.plan import PlannedVideo, plan_videos
from feature_store.reader import FeatureReader
from feature_store.snapshot import finalise
from feature_store.storage import open_storage
from feature_store.verify import verify_store
from tests.feature_store.store_tools import features, make_store, write_shards

KINDS = ("index/*/snapshot*.json", "_plan/*.json", "_commits/*.json")
NAMES = "abcdefgh"


def fill(root: Path, prefix: str) -> Path:
    """Nine videos in the shards of two segments, a third that is not committed; two deletions, and a split."""
    videos = {f"{prefix}{name}": features(f"{prefix}{name}", 150) for name in NAMES}
    make_store(root, {key: videos[key] for key in list(videos)[:5]}, 512)
    name_split(root, "tr", [f"{prefix}a", f"{prefix}b"])
    write_shards(root, {**videos, f"{prefix}broken": None})
    finalise(root)
    delete_videos(root, [f"{prefix}c"])
    delete_videos(root, [f"{prefix}d"])
    plan_videos(root, [PlannedVideo(f"{prefix}later{k}", f"{k}.mp4") for k in range(2)], 1)
    return root


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two stores of one extractor and the same shape."""
    folder = tmp_path_factory.mktemp("stores")
    return fill(folder / "one", "v"), fill(folder / "other", "w")


def sealed(root: Path) -> list[Path]:
    return [path.relative_to(root) for kind in KINDS for path in sorted(root.glob(kind))]


def told(root: Path) -> tuple[list[bytes], list[bytes], dict[str, list[bytes]]]:
    """What readers see, every byte of it compared; what is deleted; the splits."""
    reader = FeatureReader(root, "always")
    for video in range(reader.index.num_videos):
        assert np.array_equal(reader.read(video), features(reader.index.video_id(video), 150))
    index = reader.index
    return index.id_list(), index.deleted(), {name: index.split_ids(name) for name in index.splits}


def mended(root: Path, before: object, what: str, deep: bool) -> str:
    """A repair, and what it did; nothing good is taken out, and nothing that was deleted is read."""
    assert verify_store(root, deep=deep).problems, what
    report = verify_store(root, deep=deep, repair=True)
    assert report.problems == [], what
    again = verify_store(root, deep=True, repair=True)
    assert (again.problems, again.repaired) == ([], []), what
    assert told(root) == before, (what, report.repaired)
    assert not [name for name in open_storage(root).names("_voided") if name.endswith(".shard")], what
    assert {key for key in report.to_extract if key[0] == "w"} == set(), what
    given = {video.video_id for task in plan_videos(root, [], 1) for video in task.videos}
    unknown = {"vlater0", "vlater1"} - given
    assert not unknown or any("give the videos to extract again" in line for line in report.repaired), what
    return report.repaired[0].split(" ")[0]


# Nothing tells the plan of another store of the same extractor from the own one while no shard of it is committed.
NOT_TOLD = (1, Path("_plan/plan-002.json"), Path("_plan/plan-002.json"))


def put(stores: tuple[Path, Path], number: int, source: Path, target: Path, tmp_path: Path, deep: bool) -> str:
    root = tmp_path / "store"
    shutil.copytree(stores[0], root)
    try:
        shutil.copy(stores[number] / source, root / target)
        if (root / target).read_bytes() == (stores[0] / target).read_bytes():
            return "the same"
        return mended(root, told(stores[0]), f"{source} of store {number} over {target}, deep={deep}", deep)
    finally:
        shutil.rmtree(root)


def pairs(stores: tuple[Path, Path]) -> list[tuple[int, Path, Path]]:
    return [
        (number, source, target)
        for target in sealed(stores[0])
        for number in (0, 1)
        for source in sealed(stores[number])
        if (number or source != target) and (number, source, target) != NOT_TOLD
    ]


def test_a_file_over_another(stores: tuple[Path, Path], tmp_path: Path) -> None:
    """Some of all pairs; the slow test takes all."""
    for number, source, target in random.Random(0).sample(pairs(stores), 15):
        put(stores, number, source, target, tmp_path, False)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("deep", [False, True])
def test_every_file_over_every_other(stores: tuple[Path, Path], tmp_path: Path, deep: bool) -> None:
    """One half of the pairs with a quick repair, the other with a deep one: all both ways take six minutes."""
    half = pairs(stores)[deep::2]
    counts = Counter(put(stores, *pair, tmp_path, deep) for pair in half)
    print(f"\n{sum(counts.values())} pairs: {dict(counts)}")
    assert counts.total() == len(half) > 500


class Killed(BaseException):
    """Stands for SIGKILL: no handler of the code under test takes it."""


def test_a_repair_of_several_that_is_killed(
    stores: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every one of its writes: the next repair ends in the same store."""
    one, other = stores
    before, kills = told(one), 0
    for kill_at in range(1000):
        root = Path(shutil.copytree(one, tmp_path / f"{kill_at}"))
        shutil.copy(other / "_plan/plan-000.json", root / "_plan/plan-000.json")
        shutil.copy(one / "_plan/plan-002.json", root / "_plan/plan-001.json")
        shutil.copy(other / "_commits/000003.json", root / "_commits/000003.json")
        shutil.copy(one / "index/000004/snapshot.json", root / "index/000005/snapshot.json")
        with monkeypatch.context() as patch:
            calls = count()
            for step in ("create", "replace", "move", "remove"):
                patch.setattr(LocalStorage, step, _killed(getattr(LocalStorage, step), calls, kill_at))
            try:
                verify_store(root, repair=True)
            except Killed:
                kills += 1
            else:
                break
        report = verify_store(root, repair=True, writers_gone=True)
        assert report.problems == [], kill_at
        assert told(root) == before, kill_at
        assert not [name for name in open_storage(root).names("_voided") if name.endswith(".shard")], kill_at
        again = verify_store(root, deep=True, repair=True)
        assert (again.problems, again.repaired) == ([], []), kill_at
        given = {video.video_id for task in plan_videos(root, [], 1) for video in task.videos}
        assert given == {"vlater0", "vlater1"}, "of the segment that was copied nothing is forgotten"
    assert kills > 10


def _killed(real: Callable[..., Any], calls: Iterator[int], kill_at: int) -> Callable[..., Any]:
    def step(*args: Any) -> Any:
        if next(calls) == kill_at:
            raise Killed
        return real(*args)

    return step
