"""feature_store.extract_worker without Ray: what is encoded, what waits for a further shard, what stops the work."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from feature_store.commit import read_commit
from feature_store.config import DecodeConfig, ExtractConfig
from feature_store.encoder import kept_weights, prepare_encoder
from feature_store.extract import ExtractProgress, extract_corpus
from feature_store.extract_worker import ShardWorker, _InOrder, largest_first
from feature_store.info import failures
from feature_store.layout import create_store, open_store
from feature_store.manifest import list_inputs
from feature_store.plan import PlannedVideo, ShardTask
from feature_store.plan_repair import plan_shard
from feature_store.reader import FeatureReader
from feature_store.records import VideoRecord
from feature_store.s3d import S3D
from feature_store.snapshot import finalise
from feature_store.storage import open_storage
from feature_store.tally import Tally
from feature_store.weights import load_s3d
from feature_store.writer import ShardAttempt
from tests.feature_store.store_tools import features_of, provenance
from tests.feature_store.timed_videos import write_frames
from vlm_dist.errors import ExtractionError, StoreError

TINY = ExtractConfig(decode=DecodeConfig(fps=2, size=32), batch_seconds=8)
ROWS = 256  # of a shard


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> list[PlannedVideo]:
    """Three videos of 150 s, a frame a second, and one of 300 s; FLV does not say how long its video is."""
    folder = tmp_path_factory.mktemp("long")
    paths = [write_frames(folder / name, [*range(150), 149.9]) for name in ("a.mp4", "b.mp4", "c.flv")]
    return list_inputs([*paths, write_frames(folder / "long.flv", [*range(300)])])


def make_worker(store: Path, videos: Sequence[PlannedVideo]) -> tuple[ShardWorker, list[int]]:
    """A worker at a store of 256 rows a shard, and a list that will have the sizes of the batches that it encodes."""
    encoder = prepare_encoder(store, videos, TINY, random_seed=0, rows_per_shard=ROWS)
    worker = ShardWorker(store, TINY, encoder.state(), 1)
    encoded: list[int] = []
    worker.encoder.register_forward_hook(lambda model, args, out: encoded.append(len(out)))
    return worker, encoded


def told(worker: ShardWorker, task: ShardTask) -> Tally:
    """What the worker says at the end of a shard."""
    *_, last = worker.extract(task)
    return last.tally


def test_what_says_that_it_does_not_fit_is_not_encoded(tmp_path: Path, videos: list[PlannedVideo]) -> None:
    worker, encoded = make_worker(tmp_path / "store", videos)
    assert told(worker, ShardTask(0, tuple(videos[:2]))) == Tally(1, 150, {"overflow": 1})
    assert sum(encoded) == 150
    assert told(worker, ShardTask(1, (videos[1],))) == Tally(1, 150, {})
    assert sum(encoded) == 300
    waiting = read_commit(worker.meta, 0).videos[1]
    assert (waiting.video_id, waiting.status, waiting.claimed_s) == ("b", "overflow", pytest.approx(150, abs=2))


def test_what_turns_out_not_to_fit_is_not_encoded_to_its_end(tmp_path: Path, videos: list[PlannedVideo]) -> None:
    a, _, c, long = videos
    worker, encoded = make_worker(tmp_path / "store", videos)
    assert told(worker, ShardTask(0, (a, c))).reasons == {"overflow": 1}
    assert 150 < sum(encoded) <= ROWS
    encoded.clear()
    assert told(worker, ShardTask(1, (long,))) == Tally(0, 0, {"too_long": 1})
    assert sum(encoded) <= ROWS
    (refused,) = read_commit(worker.meta, 1).videos
    assert (refused.status, refused.reason, refused.decoded_s > ROWS) == ("failed", "too_long", True)


@given(
    rows=st.lists(st.one_of(st.none(), st.integers(1, 120)), min_size=1, max_size=12),
    claims=st.lists(st.integers(0, 300), min_size=12, max_size=12),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_rows_do_not_depend_on_who_is_finished_first(
    rows: list[int | None], claims: list[int], data: st.DataObject
) -> None:
    order = data.draw(st.permutations(range(len(rows))))
    outcomes = []
    for place, (count, claim) in enumerate(zip(rows, claims, strict=False)):
        record = VideoRecord(video_id=f"v{place}", status="ok" if count else "failed", claimed_s=claim)
        outcomes.append((record, np.ones((count, 512), np.float16) if count else None))
    found = []
    for places in (range(len(rows)), order):
        with TemporaryDirectory() as folder:
            create_store(Path(folder) / "s", provenance().model_copy(update={"feature_dim": 512}), ROWS)
            with ShardAttempt(Path(folder) / "s", 0) as attempt:
                shard = _InOrder(attempt)
                for place in places:
                    shard.put(place, *outcomes[place], key=f"v{place}")
                assert shard.spooled == [r.video_id for r in attempt._records.values() if r.status == "ok"]
                found.append((list(attempt._records.values()), shard.tally))
    assert found[0] == found[1]
    assert [record.video_id for record in found[0][0]] == [f"v{place}" for place in range(len(rows))]


@pytest.mark.usefixtures("ray_session")
@pytest.mark.slow
def test_several_videos_at_once_give_the_same_shard(
    tmp_path: Path, videos: list[PlannedVideo], broken_videos: dict[str, Path]
) -> None:
    broken = [PlannedVideo(reason, str(path)) for reason, path in broken_videos.items()]
    task = ShardTask(0, (videos[0], *broken, videos[1], videos[2]))
    alone, _ = make_worker(tmp_path / "alone", videos)
    encoder = prepare_encoder(tmp_path / "several", videos, TINY, random_seed=0, rows_per_shard=ROWS)
    several = ShardWorker(tmp_path / "several", TINY, encoder.state(), 1, decoders=3, chunk_seconds=3)
    expected = Tally(1, 150, {**dict.fromkeys(broken_videos, 1), "overflow": 2})
    assert told(alone, task) == told(several, task) == expected
    one, other = (read_commit(worker.meta, 0).videos for worker in (alone, several))
    for left, right in zip(one, other, strict=True):
        # The time it took, and how far a video was decoded until it was seen that it does not fit.
        unlike = {"seconds", "decoded_s"} if left.status == "overflow" else {"seconds", "crc32c"}
        assert left.model_dump(exclude=unlike) == right.model_dump(exclude=unlike)
    for worker in (alone, several):
        finalise(worker.meta.root)
    rows, also = (FeatureReader(worker.meta.root).read(0).astype(np.float32) for worker in (alone, several))
    assert np.abs(rows - also).max() <= 2**-11


@pytest.mark.slow
def test_two_shards_at_once_have_no_more_videos_in_work_than_one(
    tmp_path: Path, videos: list[PlannedVideo], monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = [ShardTask(0, (videos[0], videos[2])), ShardTask(1, (videos[1],))]
    apart, _ = make_worker(tmp_path / "apart", videos)
    expected = [told(apart, task) for task in tasks]
    together, _ = make_worker(tmp_path / "together", videos)
    at_once: list[str] = []
    order: list[str] = []
    tried = ShardWorker._tried

    def seen(worker: ShardWorker, video: PlannedVideo, rows: _InOrder) -> tuple[VideoRecord, np.ndarray | None]:
        at_once.append(video.video_id)
        order.append(video.video_id)
        assert len(at_once) == 1
        outcome = tried(worker, video, rows)
        at_once.remove(video.video_id)
        return outcome

    monkeypatch.setattr(ShardWorker, "_tried", seen)
    first = together.extract(tasks[0])
    assert next(sign for sign in first if sign.all_begun).tally.ok == 1, "its second video is in work"
    second = together.extract(tasks[1])
    with ThreadPoolExecutor(2) as threads:
        ends = [list(ends)[-1] for ends in threads.map(list, (first, second))]
    assert [end.tally for end in ends] == expected
    assert order == ["a", "c", "b"]
    for shard in range(2):
        one, other = (read_commit(worker.meta, shard) for worker in (apart, together))
        assert (one.crc32c, one.rows) == (other.crc32c, other.rows)
    work = ends[1].work
    assert work.encoded_s >= 300, "a worker's times go on from shard to shard"
    assert work.waiting_s > 0
    assert work.working_s > 0


def test_one_video_at_a_time_is_told_before_it_begins(
    tmp_path: Path, videos: list[PlannedVideo], monkeypatch: pytest.MonkeyPatch
) -> None:
    worker, _ = make_worker(tmp_path / "store", videos)
    begun: list[str] = []
    tried = ShardWorker._tried

    def seen(worker: ShardWorker, video: PlannedVideo, rows: _InOrder) -> tuple[VideoRecord, np.ndarray | None]:
        begun.append(video.video_id)
        return tried(worker, video, rows)

    monkeypatch.setattr(ShardWorker, "_tried", seen)
    told: list[tuple[str, list[str]]] = []
    for sign in worker.extract(ShardTask(0, (videos[0], videos[1], videos[2])), True, {"b": "it is deadly"}):
        if not told or told[-1][0] != sign.alone:
            told.append((sign.alone, list(begun)))
    assert told == [("a", []), ("", ["a"]), ("c", ["a"]), ("", ["a", "c"])]
    given_up = read_commit(worker.meta, 0).videos[1]
    assert (given_up.status, given_up.reason, given_up.message) == ("failed", "worker_crash", "it is deadly")


def test_what_was_finished_is_taken_from_the_spool(
    tmp_path: Path, videos: list[PlannedVideo], monkeypatch: pytest.MonkeyPatch
) -> None:
    worker, encoded = make_worker(tmp_path / "store", videos)

    def full(attempt: ShardAttempt) -> bool:
        raise StoreError("the disk is full")

    monkeypatch.setattr(ShardAttempt, "commit", full)
    with pytest.raises(StoreError, match="full"):
        told(worker, ShardTask(0, (videos[0],)))
    monkeypatch.undo()
    assert sum(encoded) == 150
    assert told(worker, ShardTask(0, (videos[0],))) == Tally(1, 150)
    assert sum(encoded) == 150, "not a second of it was encoded again"
    assert not list(worker._spool._folder.iterdir())


def test_a_committed_shard_is_told_and_not_made_again(tmp_path: Path, videos: list[PlannedVideo]) -> None:
    task = ShardTask(0, (videos[0], PlannedVideo("gone", str(tmp_path / "gone.mp4")), videos[1]))
    worker, encoded = make_worker(tmp_path / "store", videos)
    first = told(worker, task)
    encoded.clear()
    assert told(worker, task) == first == Tally(1, 150, {"missing": 1, "overflow": 1})
    assert not encoded


def test_no_file_stops_a_shard(tmp_path: Path, videos: list[PlannedVideo], broken_videos: dict[str, Path]) -> None:
    strange = write_frames(tmp_path / "strange.mp4", [0, 1, 2])
    strange.write_bytes(strange.read_bytes().replace(b"avc1", b"zz9q"))
    bad = [*broken_videos.values(), strange, tmp_path / f"{'x' * 300}.mp4"]
    given = [PlannedVideo(f"v{number}", str(path)) for number, path in enumerate(bad)]
    worker, _ = make_worker(tmp_path / "store", [*given, videos[0]])  # it is calibrated on them, too
    tally = told(worker, ShardTask(0, (*given, videos[0])))
    assert tally == Tally(1, 150, {**dict.fromkeys(broken_videos, 1), "not_a_video": 2, "error": 1})


def test_weights_that_give_no_numbers_stop_the_work(tmp_path: Path, videos: list[PlannedVideo]) -> None:
    make_worker(tmp_path / "store", videos[:1])
    state = {key: value.numpy() for key, value in S3D().state_dict().items()}
    state["fc.bias"] = np.full(512, np.nan, np.float32)
    with pytest.raises(ExtractionError, match="no finite numbers even for a black picture"):
        ShardWorker(tmp_path / "store", TINY, state, 1).ready()


def test_videos_in_a_bucket(
    tmp_path: Path, bucket: str, videos: list[PlannedVideo], broken_videos: dict[str, Path]
) -> None:
    one, two, *_ = (Path(video.path) for video in videos)
    given = {"one.mp4": one, "deep/two.mp4": two, "cut.mp4": broken_videos["truncated"]}
    place = open_storage(f"{bucket}/videos")
    for name, path in given.items():
        place.replace(name, path.read_bytes())
    (tmp_path / "list.csv").write_text(f"video_id,path\ngone,{bucket}/videos/gone.mp4\n")
    listed = list_inputs([f"{bucket}/videos", tmp_path / "list.csv"])
    summary = extract_corpus(tmp_path / "store", listed, TINY, random_seed=0, here=True)
    assert summary.tally == Tally(2, 300, {"truncated": 1, "missing": 1})
    reader = FeatureReader(tmp_path / "store")
    model, _ = load_s3d(tmp_path / "store" / kept_weights(open_store(tmp_path / "store")))
    for name, path in {"one": one, "two": two}.items():
        alone = features_of(path, model, TINY).features.astype(np.float32)
        assert np.abs(reader.read(reader.index.find(name)).astype(np.float32) - alone).max() <= 2**-11
    reasons = {record.video_id: record.message for record in failures(tmp_path / "store")}
    assert reasons["gone"] == f"{bucket}/videos/gone.mp4: no such object"
    assert reasons["cut"].startswith(f"{bucket}/videos/cut.mp4: ")
    place.replace("gone.mp4", one.read_bytes())
    again = extract_corpus(tmp_path / "store", listed, TINY, random_seed=0, here=True)
    assert again.tally == Tally(1, 150), "what was missing has its turn once it is there"


def test_large_files_first_and_what_has_no_size_last(tmp_path: Path) -> None:
    for name, size in {"a": 3, "b": 9, "c": 3}.items():
        (tmp_path / name).write_bytes(bytes(size))
    paths = [tmp_path / "a", tmp_path / "gone", tmp_path / "b", "s3://bucket/x", tmp_path / "c"]
    task = ShardTask(0, tuple(PlannedVideo(str(k), str(path)) for k, path in enumerate(paths)))
    assert largest_first(task) == [2, 0, 4, 1, 3]


def test_a_video_that_overflowed_its_shard_counts_once(tmp_path: Path, videos: list[PlannedVideo]) -> None:
    store, both = tmp_path / "store", videos[:2]
    prepare_encoder(store, both, TINY, random_seed=0, rows_per_shard=ROWS)
    plan_shard(open_store(store), both)
    states: list[ExtractProgress] = []
    summary = extract_corpus(
        store, both, TINY, random_seed=0, rows_per_shard=ROWS, here=True, on_progress=states.append
    )
    assert summary.tally == Tally(2, 300, {"overflow": 1})
    assert all(state.done <= state.videos for state in states)
    assert (states[-1].done, states[-1].videos, states[-1].eta_s) == (2, 2, 0)
