"""feature_store.extract_worker without Ray: what is encoded, what waits for a further shard, what stops the work."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from feature_store.commit import read_commit
from feature_store.config import DecodeConfig, ExtractConfig
from feature_store.encoder import prepare_encoder
from feature_store.extract_worker import ShardWorker
from feature_store.manifest import list_inputs
from feature_store.plan import PlannedVideo, ShardTask
from feature_store.s3d import S3D
from feature_store.tally import Tally
from tests.feature_store.timed_videos import write_frames
from vlm_dist.errors import ExtractionError

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
