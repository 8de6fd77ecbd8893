"""From a real store on disk to masked batches: splits, order, clips and statistics over its index and reader."""

import json
from pathlib import Path

import numpy as np
import pytest

from feature_store.captions import write_captions
from feature_store.config import CaptionConfig
from feature_store.layout import create_store
from feature_store.plan import PlannedVideo, plan_videos
from feature_store.reader import FeatureReader
from feature_store.records import Provenance, VideoRecord
from feature_store.snapshot import finalise
from feature_store.tokenizer import load_tokenizer
from feature_store.writer import ShardAttempt
from vlm_dist.data.batch import ClipBatch, SpecialIds
from vlm_dist.data.clips import load_clips, sample_spans
from vlm_dist.data.config import ClipConfig, MaskConfig, SplitConfig
from vlm_dist.data.masks import mask_batch
from vlm_dist.data.sampler import GlobalOrder
from vlm_dist.data.splits import split_videos
from vlm_dist.data.stats import corpus_stats
from vlm_dist.errors import ConfigError
from vlm_dist.model.config import ModelConfig

WIDTH = 8
MODEL = ModelConfig(max_video_len=12, max_len=40)
CLIPS = ClipConfig(clips_per_video=4)
WORDS = ["whisk", "the", "eggs", "then", "cut", "a", "red", "pepper", "and", "stir", "slowly"]


@pytest.fixture(scope="module")
def features() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    lengths = {f"vidéo {i}": int(rng.integers(5, 90)) for i in range(12)}
    return {name: rng.standard_normal((n, WIDTH)).astype(np.float16) for name, n in lengths.items()}


@pytest.fixture(scope="module")
def store(tmp_path_factory, features) -> Path:
    """Twelve videos; the last two have no captions, and one more failed in extraction."""
    root = tmp_path_factory.mktemp("store") / "s"
    create_store(root, Provenance(weights_sha256="0" * 64, weights="random seed 0", feature_dim=WIDTH))
    planned = [PlannedVideo(name, f"{name}.mp4") for name in [*features, "broken"]]
    for task in plan_videos(root, planned, workers=2):
        with ShardAttempt(root, task.shard) as attempt:
            for video in task.videos:
                rows = features.get(video.video_id)
                failed = {} if rows is not None else {"status": "failed", "reason": "corrupt"}
                attempt.add(VideoRecord(video_id=video.video_id, **failed), rows)
            assert attempt.commit()
    finalise(root)
    rng = np.random.default_rng(1)
    captions = {}
    for name, rows in list(features.items())[:10]:
        start = np.arange(0, len(rows) - 1, 1.7)
        said = [" ".join(rng.choice(WORDS, rng.integers(2, 7), replace=False)) for _ in start]
        captions[name] = {"start": start.tolist(), "end": (start + 1.6).tolist(), "text": said}
    file = root.parent / "captions.json"
    file.write_text(json.dumps(captions))
    write_captions(root, file, CaptionConfig(tokenizer="wordpiece:80", deduplicate="off"))
    return root


def masked(
    reader: FeatureReader, order: GlobalOrder, update: int, first: int = 0, last: int | None = None
) -> ClipBatch:
    ids = SpecialIds.of(load_tokenizer(str(reader.index.tokenizer_dir)))
    keys = order.keys(update, first, last)
    return mask_batch(load_clips(reader, keys, CLIPS, MODEL, ids), keys, MaskConfig(), ids)


def test_clips_hold_the_stores_features_and_words(store, features):
    reader = FeatureReader(store, check="always")
    index = reader.index
    tokenizer = load_tokenizer(str(index.tokenizer_dir))
    split = split_videos(index, SplitConfig(validation_share=0.3), {})
    order = GlobalOrder(split.train, 0, 32, CLIPS.clips_per_video)
    keys = order.keys(0)
    spans = sample_spans(index, keys, CLIPS, MODEL.max_video_len)
    batch = load_clips(reader, keys, CLIPS, MODEL, SpecialIds.of(tokenizer))
    for i, video in enumerate(keys.video):
        rows = features[index.video_id(int(video))][spans.row[i] : spans.row_end[i]]
        assert np.array_equal(batch.video[i][batch.video_mask[i]].numpy(), rows)
        said = " ".join(index.clip_text(clip) for clip in range(spans.first[i], spans.last[i]))
        words = tokenizer.encode(said)[: MODEL.max_text_len]
        n = len(words)
        assert batch.text[i, : n + 3].tolist() == [tokenizer.cls_id, tokenizer.sep_id, *words, tokenizer.sep_id]
        assert int(batch.text_mask[i].sum()) == n + 3


def test_any_slice_and_any_reader_gives_the_same_masked_clips(store):
    order = GlobalOrder(split_videos(FeatureReader(store).index, SplitConfig(), {}).train, 5, 32, 4)
    whole = masked(FeatureReader(store), order, 9)
    assert whole.num_masked_text > 0
    assert whole.num_masked_video > 0
    reader = FeatureReader(store)
    masked(reader, order, 2)
    part = masked(reader, order, 9, 7, 19)
    for name, tensor in vars(part).items():
        assert tensor.equal(getattr(whole, name)[7:19]), name


def test_split_and_statistics_of_a_store(store, features):
    index = FeatureReader(store).index
    split = split_videos(index, SplitConfig(validation_share=0.3), {"known": {"vidéo 3", "absent"}})
    names = {index.video_id(int(row)) for row in np.concatenate([split.train, split.validation])}
    assert names == {f"vidéo {i}" for i in range(10) if i != 3}
    assert (split.without_features, split.without_captions) == (0, 2)
    assert split.excluded == {"known": 1}
    stats = corpus_stats(index, split.train)
    assert stats["videos"] == len(split.train)
    assert stats["seconds_per_video"] == np.mean([len(features[index.video_id(int(row))]) for row in split.train])
    with pytest.raises(ConfigError, match=r"of 12 in the store.*10 on the list known"):
        split_videos(index, SplitConfig(), {"known": {f"vidéo {i}" for i in range(10)}})
