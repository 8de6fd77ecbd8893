"""feature_store.extract on a real Ray: a corpus with broken videos, again, more of it, dead workers, a full disk."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from feature_store import dispatch, extract
from feature_store.at_work import require_no_writers
from feature_store.config import DecodeConfig, ExtractConfig
from feature_store.encoder import kept_weights, prepare_encoder
from feature_store.extract import ExtractProgress, ExtractSummary, extract_corpus
from feature_store.extract_worker import ATTEMPTS, RemoteShardWorker, ShardWorker
from feature_store.info import failures
from feature_store.layout import open_store
from feature_store.manifest import list_inputs
from feature_store.plan import PlannedVideo
from feature_store.reader import FeatureReader
from feature_store.verify import verify_store
from feature_store.weights import load_s3d
from tests.feature_store.store_tools import features_of
from vlm_dist.errors import ConfigError, ExtractionError, StoreError

pytestmark = pytest.mark.usefixtures("ray_session")
CFG = ExtractConfig(decode=DecodeConfig(fps=16, size=64), workers=2)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, make_video: Callable[..., Path]) -> Path:
    """Ten small videos of 2 to 4 seconds."""
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(10):
        make_video(folder / f"v{number}.mp4", 2 + number % 3, seed=number)
    return folder


@pytest.fixture(scope="module")
def extracted(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ExtractSummary]:
    store = tmp_path_factory.mktemp("extracted") / "store"
    return store, extract_corpus(store, list_inputs([corpus]), CFG, random_seed=0)


def all_features(store: Path) -> dict[str, np.ndarray]:
    reader = FeatureReader(store, check="always")
    return {reader.index.video_id(k): reader.read(k) for k in range(reader.index.num_videos)}


def test_features_are_those_of_the_one_function(corpus: Path, extracted: tuple[Path, ExtractSummary]) -> None:
    store, summary = extracted
    assert (summary.tally.ok, summary.tally.failed, summary.tally.seconds) == (10, 0, 29)
    assert not summary.nothing_to_do
    assert summary.shards >= 4
    model, _ = load_s3d(store / kept_weights(open_store(store)))
    features = all_features(store)
    assert sorted(features) == [f"v{number}" for number in range(10)]
    for video_id, rows in features.items():
        alone = features_of(corpus / f"{video_id}.mp4", model, CFG).features
        assert rows.shape == alone.shape
        assert np.abs(rows.astype(np.float32) - alone.astype(np.float32)).max() < 2e-3
    assert not verify_store(store, deep=True, repair=False).problems


def test_what_is_wrong_with_the_settings_of_a_worker_is_told_as_it_is(corpus: Path, tmp_path: Path) -> None:
    half = CFG.model_copy(update={"precision": "float16"})
    with pytest.raises(ConfigError, match=r"^extract\.precision=float16 is for GPUs"):
        extract_corpus(tmp_path / "store", list_inputs([corpus]), half, random_seed=0)


class MortalShardWorker(ShardWorker):
    """Dies of a video called `killer`, as a worker does for which the node has no memory."""

    def _tried(self, video: PlannedVideo, *rest: Any) -> Any:
        if video.video_id == "killer":
            os._exit(1)
        return super()._tried(video, *rest)


class MortalWorker(RemoteShardWorker):
    def __init__(self, *args: Any, **settings: Any) -> None:
        self._made = lambda: MortalShardWorker(*args, **settings)


@pytest.mark.slow
def test_a_video_that_kills_its_worker_is_recorded_and_the_shard_goes_on(
    corpus: Path, extracted: tuple[Path, ExtractSummary], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extract, "RemoteShardWorker", MortalWorker)
    videos = list_inputs([corpus])
    videos.insert(4, PlannedVideo("killer", str(shutil.copy(corpus / "v0.mp4", tmp_path / "killer.mp4"))))
    summary = extract_corpus(tmp_path / "store", videos, CFG.model_copy(update={"workers": 1}), random_seed=0)
    assert (summary.tally.ok, summary.tally.reasons, summary.tally.seconds) == (10, {"worker_crash": 1}, 29)
    assert summary.worker_deaths == 4
    (record,) = failures(tmp_path / "store")
    assert record.message.startswith(f"{tmp_path}/killer.mp4: 2 workers died that had no other video in work")
    assert sorted(all_features(tmp_path / "store")) == [f"v{number}" for number in range(10)]


def test_provenance_says_what_the_encoder_was(extracted: tuple[Path, ExtractSummary]) -> None:
    provenance = open_store(extracted[0]).provenance
    assert provenance.weights == "random seed 0"
    assert provenance.random_seed == 0
    assert provenance.calibration == "10 one-second clips of the corpus"
    assert (provenance.fps, provenance.window, provenance.size) == (16, 16, 64)
    assert provenance.normalised
    assert provenance.decoder.startswith("PyAV")


def test_again_does_nothing(corpus: Path, extracted: tuple[Path, ExtractSummary]) -> None:
    store, first = extracted
    before = {path: path.stat().st_mtime_ns for path in store.rglob("*") if path.is_file()}
    again = extract_corpus(store, list_inputs([corpus]), CFG, random_seed=0)
    assert again.nothing_to_do
    assert (again.listed, again.tally.ok, again.snapshot) == (10, 0, first.snapshot)
    assert before == {path: path.stat().st_mtime_ns for path in store.rglob("*") if path.is_file()}


def test_more_videos_go_through_the_same_encoder(
    corpus: Path, extracted: tuple[Path, ExtractSummary], tmp_path: Path, make_video: Callable[..., Path]
) -> None:
    store = shutil.copytree(extracted[0], tmp_path / "store")
    new = make_video(tmp_path / "new.mp4", 3.0, seed=99)
    summary = extract_corpus(store, list_inputs([corpus, new]), CFG, random_seed=0)
    assert (summary.tally.ok, summary.shards) == (1, 1)
    features = all_features(store)
    assert len(features) == 11
    model, _ = load_s3d(store / kept_weights(open_store(store)))
    alone = features_of(new, model, CFG).features
    assert np.abs(features["new"].astype(np.float32) - alone.astype(np.float32)).max() < 2e-3


def test_another_encoder_is_refused(corpus: Path, extracted: tuple[Path, ExtractSummary]) -> None:
    videos = list_inputs([corpus])
    with pytest.raises(StoreError, match="random seed"):
        extract_corpus(extracted[0], videos, CFG, random_seed=1)
    other = CFG.model_copy(update={"decode": CFG.decode.model_copy(update={"fps": 8})})
    with pytest.raises(StoreError, match="fps is 16"):
        extract_corpus(extracted[0], videos, other, random_seed=0)
    unrotated = CFG.model_copy(update={"decode": CFG.decode.model_copy(update={"rotate": False})})
    with pytest.raises(StoreError, match="decoder"):
        extract_corpus(extracted[0], videos, unrotated, random_seed=0)


def test_broken_videos_are_recorded_and_the_rest_goes_on(
    tmp_path: Path, make_video: Callable[..., Path], broken_videos: dict[str, Path]
) -> None:
    good = [make_video(tmp_path / f"good{number}.mp4", 2.0, seed=number) for number in range(3)]
    videos = list_inputs([*good, *broken_videos.values()])
    videos.append(PlannedVideo(video_id="good1", path=str(good[2])))
    seen: list[ExtractProgress] = []

    def look(progress: ExtractProgress) -> None:
        seen.append(progress)
        with pytest.raises(StoreError, match="is being written to"):
            require_no_writers(open_store(tmp_path / "store"))

    summary = extract_corpus(tmp_path / "store", videos, CFG, random_seed=0, on_progress=look)
    assert (summary.listed, summary.tally.ok, summary.tally.failed) == (10, 3, 6)
    assert summary.tally.reasons == dict.fromkeys(broken_videos, 1)
    found = failures(tmp_path / "store")
    assert {record.reason for record in found} == {*broken_videos, "duplicate"}
    for record in found:
        if record.reason != "duplicate":
            assert Path(record.path) == broken_videos[record.reason]
            assert record.message
    truncated = next(record for record in found if record.reason == "truncated")
    assert 0 < truncated.decoded_s < truncated.claimed_s
    assert sorted(all_features(tmp_path / "store")) == ["good0", "good1", "good2"]
    assert (seen[-1].done, seen[-1].videos, seen[-1].shards_done) == (9, 9, seen[-1].shards)
    assert seen[-1].video_seconds_per_s > 0
    assert seen[-1].eta_s == 0


def test_weights_must_be_chosen(corpus: Path, tmp_path: Path) -> None:
    videos = list_inputs([corpus])
    with pytest.raises(ConfigError, match="S3D_HowTo100M"):
        extract_corpus(tmp_path / "store", videos, CFG)
    with pytest.raises(ConfigError, match="not both"):
        extract_corpus(tmp_path / "store", videos, CFG, random_seed=0, weights=Path("a.pth"))
    with pytest.raises(ConfigError, match="mixed_5c"):
        extract_corpus(tmp_path / "store", videos, CFG.model_copy(update={"layer": "mixed_5c"}), random_seed=0)
    assert not (tmp_path / "store").exists()


def test_given_weights(corpus: Path, extracted: tuple[Path, ExtractSummary], tmp_path: Path) -> None:
    weights = extracted[0] / kept_weights(open_store(extracted[0]))
    cfg = CFG.model_copy(update={"layer": "mixed_5c", "normalise": False})
    summary = extract_corpus(tmp_path / "store", list_inputs([corpus / "v0.mp4"]), cfg, weights=weights)
    assert summary.tally.ok == 1
    assert all_features(tmp_path / "store")["v0"].shape == (2, 1024)
    assert open_store(tmp_path / "store").provenance.random_seed is None
    assert not (tmp_path / "store" / "_extractor").exists()


def test_lost_random_weights_are_named(corpus: Path, extracted: tuple[Path, ExtractSummary], tmp_path: Path) -> None:
    store = shutil.copytree(extracted[0], tmp_path / "store")
    kept = store / kept_weights(open_store(store))
    kept.write_bytes(kept.read_bytes()[:-4] + b"\0\0\0\0")
    with pytest.raises(StoreError, match="damaged"):
        prepare_encoder(store, list_inputs([corpus]), CFG, random_seed=0)


def test_more_workers_than_the_cluster_has(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Ray has 2 CPUs and 0 GPUs; use --workers 2"):
        extract_corpus(tmp_path / "store", list_inputs([corpus]), CFG.model_copy(update={"workers": 8}), random_seed=0)
    with pytest.raises(ConfigError, match="GPU"):
        extract_corpus(
            tmp_path / "store", list_inputs([corpus]), CFG.model_copy(update={"gpus_per_worker": 1.0}), random_seed=0
        )


def processes_of(actor: str) -> list[psutil.Process]:
    """The processes of a kind of Ray actor (Ray names them `ray::Class` or `ray::Class.method`)."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        command = process.info["cmdline"]
        if command and command[0].startswith(f"ray::{actor}"):
            found.append(process)
    return found


def decoders_at(video_id: str) -> list[psutil.Process]:
    """The decoders that have a video open."""
    found = []
    for process in processes_of("Decoder"):
        with suppress(psutil.Error):
            if any(Path(file.path).stem == video_id for file in process.open_files()):
                found.append(process)
    return found


class Killer(threading.Thread):
    """SIGKILLs one of the processes that `victims` gives, whenever there is one, at most `times`."""

    def __init__(self, victims: Callable[[], list[psutil.Process]], times: int) -> None:
        super().__init__(daemon=True)
        self.victims, self.times, self.kills = victims, times, 0
        self.stopped = threading.Event()

    def run(self) -> None:
        while not self.stopped.wait(0.01) and self.kills < self.times:
            if victims := self.victims():
                with suppress(ProcessLookupError):
                    os.kill(victims[self.kills % len(victims)].pid, signal.SIGKILL)
                    self.kills += 1
                time.sleep(0.3)

    def __enter__(self) -> "Killer":
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stopped.set()
        self.join()


@pytest.mark.slow
def test_a_killed_worker_costs_nothing(corpus: Path, extracted: tuple[Path, ExtractSummary], tmp_path: Path) -> None:
    store = shutil.copytree(extracted[0], tmp_path / "store")
    for name in ("features/c", "index", "_plan", "_commits", "_staging", "CURRENT"):  # keep only the encoder
        target = store / name
        if target.is_dir():
            for path in target.iterdir():
                if path.name != "zarr.json":
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
        else:
            target.unlink(missing_ok=True)
    started = lambda: processes_of("RemoteShardWorker") if any((store / "_commits").iterdir()) else []  # noqa: E731
    with Killer(started, 3) as killer:
        summary = extract_corpus(store, list_inputs([corpus]), CFG, random_seed=0)
    assert killer.kills >= 1
    assert summary.worker_deaths >= 1
    assert (summary.tally.ok, summary.tally.seconds) == (10, 29)
    before, after = all_features(extracted[0]), all_features(store)
    assert sorted(before) == sorted(after)
    for video_id, rows in before.items():
        assert np.abs(rows.astype(np.float32) - after[video_id].astype(np.float32)).max() <= 2**-11
    assert not verify_store(store, deep=True, repair=False).problems


@pytest.mark.slow
def test_a_video_that_takes_workers_down_is_given_up(tmp_path: Path, make_video: Callable[..., Path]) -> None:
    for number in range(3):
        make_video(tmp_path / f"v{number}.mp4", 2.0, seed=number)
    make_video(tmp_path / "hostile.mp4", 60.0, seed=9)
    store = tmp_path / "store"
    with Killer(lambda: decoders_at("hostile"), 99) as killer:
        summary = extract_corpus(store, list_inputs([tmp_path]), CFG.model_copy(update={"workers": 1}), random_seed=0)
    assert killer.kills == ATTEMPTS
    assert summary.worker_deaths == 0
    assert summary.tally.reasons == {"decoder_crash": 1}
    (record,) = failures(store)
    assert (record.video_id, record.reason, record.attempts) == ("hostile", "decoder_crash", ATTEMPTS)
    assert sorted(all_features(store)) == ["v0", "v1", "v2"]


@pytest.mark.slow
def test_workers_that_cannot_start_stop_the_work(corpus: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    workers = lambda: processes_of("RemoteShardWorker")  # noqa: E731
    with Killer(workers, 99), pytest.raises(ExtractionError, match="without coming any further"):
        extract_corpus(store, list_inputs([corpus]), CFG.model_copy(update={"workers": 1}), random_seed=0)


INTERRUPTED = """
import sys
from contextlib import suppress
from pathlib import Path
import ray
from feature_store.config import DecodeConfig, ExtractConfig
from feature_store.extract import extract_corpus
from feature_store.manifest import list_inputs
ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
cfg = ExtractConfig(decode=DecodeConfig(fps=16, size=64), workers=2)
show = lambda progress: print("shards", progress.shards_done, flush=True)
try:
    summary = extract_corpus(Path(sys.argv[1]), list_inputs([Path(sys.argv[2])]), cfg, random_seed=0, on_progress=show)
    print("done", summary.tally.ok, flush=True)
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_driver_goes_on(tmp_path: Path, make_video: Callable[..., Path], kind: signal.Signals) -> None:
    for number in range(12):
        make_video(tmp_path / "videos" / f"v{number}.mp4", 12.0, seed=number)
    store = tmp_path / "store"
    command = [sys.executable, "-c", INTERRUPTED, str(store), str(tmp_path / "videos")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("shards") and int(line.split()[1]) >= 2:
                break
        process.send_signal(kind)
        rest = process.stdout.read()
    assert ("interrupted" in rest) == (kind == signal.SIGINT)
    committed = {path.name: path.read_bytes() for path in (store / "_commits").iterdir()}
    assert 2 <= len(committed) < 12
    time.sleep(2)  # workers of a killed driver are ended by Ray
    summary = extract_corpus(store, list_inputs([tmp_path / "videos"]), CFG, random_seed=0)
    assert 0 < summary.shards <= 12 - len(committed)
    assert all((store / "_commits" / name).read_bytes() == data for name, data in committed.items())
    assert len(all_features(store)) == 12
    assert not verify_store(store, deep=True, repair=False).problems


@pytest.mark.slow
@pytest.mark.parametrize("part", ["raylet", "gcs_server"])
def test_the_same_command_goes_on_after_ray_itself_was_killed(
    tmp_path: Path, make_video: Callable[..., Path], part: str
) -> None:
    for number in range(12):
        make_video(tmp_path / "videos" / f"v{number}.mp4", 12.0, seed=number)
    store = tmp_path / "store"
    command = [sys.executable, "-c", INTERRUPTED, str(store), str(tmp_path / "videos")]
    quick = {**os.environ, "RAY_gcs_rpc_server_reconnect_timeout_s": "2"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True, env=quick) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("shards") and int(line.split()[1]) >= 2:
                break
        (victim,) = [one for one in psutil.Process(process.pid).children(recursive=True) if one.name() == part]
        victim.kill()
        process.stdout.read()
    assert process.returncode != 0
    committed = {path.name: path.read_bytes() for path in (store / "_commits").iterdir()}
    assert len(committed) >= 2
    summary = extract_corpus(store, list_inputs([tmp_path / "videos"]), CFG, random_seed=0)
    assert summary.shards == 12 - len(committed)
    assert all((store / "_commits" / name).read_bytes() == data for name, data in committed.items())
    assert len(all_features(store)) == 12
    assert not verify_store(store, deep=True, repair=False).problems


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 42 MiB: room for the encoder's weights and a little more."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=42m", "none", str(folder)], capture_output=True)
    if mount.returncode:
        pytest.skip("mounting a tmpfs is not allowed here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.slow
def test_a_full_disk_stops_with_a_valid_store(corpus: Path, tiny_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_POLL_S", 0.01)  # each shard is told before the next one is given out
    store, filler = tiny_disk / "store", tiny_disk / "filler"
    cfg = CFG.model_copy(update={"workers": 1})

    def fill(progress: ExtractProgress) -> None:
        if progress.shards_done >= 2 and not filler.exists():
            with filler.open("wb") as file, suppress(OSError):
                while True:
                    file.write(bytes(1 << 16))

    with pytest.raises(StoreError, match="full"):
        extract_corpus(store, list_inputs([corpus]), cfg, random_seed=0, on_progress=fill)
    filler.unlink()
    assert not verify_store(store, deep=True, repair=False).problems
    summary = extract_corpus(store, list_inputs([corpus]), cfg, random_seed=0)
    assert 0 < summary.tally.ok < 10
    assert len(all_features(store)) == 10
