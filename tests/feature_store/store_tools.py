"""What the store's tests share: random features, a filled store, and what it must hold."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from feature_store.commit import Commit
from feature_store.config import ExtractConfig
from feature_store.encode import Extracted, clip_encoder, features_from_file
from feature_store.layout import create_store
from feature_store.plan import PlannedVideo, plan_videos
from feature_store.records import Provenance, VideoRecord
from feature_store.s3d import S3D
from feature_store.snapshot import finalise
from feature_store.storage import Root, open_storage
from feature_store.writer import ShardAttempt

F = 32


def provenance(**changes: object) -> Provenance:
    """Of a small random encoder."""
    values = {"weights_sha256": "0" * 64, "weights": "random seed 0", "random_seed": 0, "feature_dim": F}
    return Provenance.model_validate(values | changes)


def features(video_id: str, rows: int, width: int = F, salt: int = 0) -> np.ndarray:
    """(rows, width) float16 that only this id gives."""
    key = int.from_bytes(video_id.encode()[-8:], "little") + 2**64 * salt
    return np.random.default_rng(key).standard_normal((rows, width)).astype(np.float16)


def write_shards(root: Root, corpus: dict[str, np.ndarray | None], workers: int = 1) -> None:
    """Plans and commits every video (None: failed), until nothing is left to do."""
    videos = [PlannedVideo(video_id, f"videos/{video_id}.mp4") for video_id in corpus]
    while tasks := plan_videos(root, videos, workers):
        for task in tasks:
            with ShardAttempt(root, task.shard) as attempt:
                for video in task.videos:
                    add_video(attempt, video, corpus[video.video_id])
                assert attempt.commit()


def add_video(attempt: ShardAttempt, video: PlannedVideo, rows: np.ndarray | None) -> VideoRecord:
    """Adds one video of a corpus to an attempt."""
    if rows is None:
        record = VideoRecord(video_id=video.video_id, path=video.path, status="failed", reason="corrupt", message="no")
    else:
        record = VideoRecord(video_id=video.video_id, path=video.path, decoded_s=len(rows), claimed_s=len(rows))
    return attempt.add(record, rows)


AnyRoot = TypeVar("AnyRoot", str, Path)


def make_store(root: AnyRoot, corpus: dict[str, np.ndarray | None], rows_per_shard: int = 1024) -> AnyRoot:
    """A finished store of a corpus."""
    create_store(root, provenance(), rows_per_shard)
    write_shards(root, corpus)
    finalise(root)
    return root


def random_corpus(videos: int, longest: int = 600, seed: int = 0) -> dict[str, np.ndarray | None]:
    """Videos of 1 to `longest` rows."""
    lengths = np.random.default_rng(seed).integers(1, longest + 1, videos).tolist()
    return {f"video-{number:03d}": features(f"video-{number:03d}", rows) for number, rows in enumerate(lengths)}


def change(root: Root, key: str, how: Callable[[bytes], bytes]) -> None:
    """Damages an object of a store, wherever the store is."""
    storage = open_storage(root)
    storage.replace(key, how(storage.read(key)))


def flipped(byte: int, bit: int = 0) -> Callable[[bytes], bytes]:
    """One bit of an object changed."""
    return lambda data: data[:byte] + bytes([data[byte] ^ 1 << bit]) + data[byte + 1 :]


def whole_after_cut(commit: Commit, size: int, width: int = F) -> set[str]:
    """Ids of a shard whose rows lie within its first bytes: chunks of 256 rows and four bytes of checksum, in order."""

    def end(record: VideoRecord) -> int:
        chunk, within = divmod(record.row + record.n_rows - 1, 256)
        return chunk * (256 * width * 2 + 4) + (within + 1) * width * 2

    return {record.video_id for record in commit.videos if record.status == "ok" and end(record) <= size}


def flip_bit(path: Path, byte: int, bit: int = 0) -> None:
    """Damages a file."""
    data = bytearray(path.read_bytes())
    data[byte] ^= 1 << bit
    path.write_bytes(data)


def features_of(path: Path, model: S3D, cfg: ExtractConfig) -> Extracted:
    """A video file's features by the weights of a model."""
    return features_from_file(path, clip_encoder(model, cfg), cfg)


def golden_s3d(shared: Path) -> S3D:
    """S3D with the weights that the reference's numbers were made with."""
    weights = np.load(shared / "golden" / "s3d_weights.npz")
    model = S3D()
    model.load_state_dict({key: torch.from_numpy(weights[key]) for key in weights.files if "text_module" not in key})
    return model
