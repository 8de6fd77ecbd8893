"""The pool of negatives in all its forms, on real gloo ranks: whose tokens are in it, and how many bytes that takes."""

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from tests.vlm_dist.train.ranks import run_ranks
from vlm_dist.data.batch import IGNORE, ClipBatch
from vlm_dist.data.rng import ClipKeys
from vlm_dist.errors import ConfigError
from vlm_dist.train.config import TrainConfig, pool_form
from vlm_dist.train.negatives import MicroBatch, Negatives, received_bytes

CLIPS, PLACES, WIDTH = 12, 6, 4


def clips(first: int, last: int) -> MicroBatch:
    """Some of twelve clips of four videos; a feature says which clip and second it is. The first two show nothing."""
    number = torch.arange(first, last)
    seconds = torch.arange(PLACES)
    mask = (seconds < 2 + number[:, None] % 4) & (number[:, None] > 1)
    labels = mask & ((number[:, None] + seconds) % 3 == 0)
    video = torch.zeros(len(number), PLACES, WIDTH, dtype=torch.float16)
    video[..., 0], video[..., 1] = number[:, None], seconds
    text = torch.full((len(number), 5), 7)
    batch = ClipBatch(
        video=video, video_mask=mask, video_labels=labels, text=text, text_mask=torch.ones_like(text, dtype=torch.bool),
        text_labels=torch.where(torch.arange(5) == 3, text, IGNORE),
    )  # fmt: skip
    ids = np.arange(first, last)
    return MicroBatch.of(batch, ClipKeys(ids // 3, 5, np.zeros_like(ids), ids, np.zeros_like(ids)))


def visible() -> list[tuple[int, ...]]:
    features = clips(0, CLIPS).clips.visible_video()
    return [tuple(row) for row in features[:, :2].int().tolist()]


def gather(form: str, bounds: list[list[int]], with_videos: bool = False) -> dict[str, Any]:
    """This rank's pool of the micro-batches that its bounds cut out, and the bytes that collectives brought it."""
    import torch.distributed as dist

    from vlm_dist.train import distributed

    brought: list[int] = []
    original = dist.all_gather

    def counting(out: list[torch.Tensor], own: torch.Tensor, **kwargs: Any) -> Any:
        brought.append(sum(part.nbytes for part in out) - own.nbytes)
        return original(out, own, **kwargs)

    dist.all_gather = counting
    try:
        mine = bounds[distributed.rank()]
        micros = [clips(first, last) for first, last in pairwise(mine)]
        shared = Negatives(form, with_videos).share(micros, torch.device("cpu"))
    finally:
        dist.all_gather = original
    pool = shared.pool
    assert pool is not None
    rows = [tuple(row) for row in pool.features[:, :2].int().tolist()]
    return {"rows": rows, "videos": pool.videos.tolist(), "shift": pool.shift, "bytes": brought,
            "dtype": str(pool.features.dtype), "counts": (shared.num_text, shared.num_video)}  # fmt: skip


SPLITS = [[[0, 2], [2, 7, 9], [9, 12]], [[0, 4], [4, 8], [8, 12]]]


@pytest.mark.parametrize("bounds", SPLITS)
def test_global_is_everything_on_every_rank(bounds: list[list[int]]) -> None:
    """A rank that shows nothing included; sent in the store's own float16, with the bytes that are documented."""
    whole = clips(0, CLIPS).clips
    for answer in run_ranks(3, gather, "global", bounds, True):
        assert answer["rows"] == visible()
        assert answer["videos"] == [clip // 3 for clip, _ in visible()]
        assert answer["shift"] == 0
        assert answer["dtype"] == "torch.float16"
        assert answer["counts"] == (whole.num_masked_text, whole.num_masked_video)
        sizes = [sum(rank[0] <= clip < rank[-1] for clip, _ in visible()) for rank in bounds]
        counts, features, videos = answer["bytes"]
        assert counts == 2 * 3 * 8
        assert features == received_bytes(sizes, WIDTH)
        assert videos == received_bytes(sizes, 1, item=8)


def test_a_group_is_the_ranks_beside_each_other() -> None:
    bounds = [[0, 3], [3, 6], [6, 9], [9, 12]]
    answers = run_ranks(4, gather, "group:2", bounds)
    for rank, answer in enumerate(answers):
        first, last = (0, 6) if rank < 2 else (6, 12)
        assert answer["rows"] == [row for row in visible() if first <= row[0] < last]
    assert gather("group:4", [[0, 12]])["rows"] == visible(), "fewer ranks than a group has are one group"


def test_a_sample_depends_on_no_split() -> None:
    one = gather("sample:9", [[0, 12]])
    assert 0 < len(one["rows"]) < len(visible())
    assert set(one["rows"]) < set(visible())
    assert one["shift"] == pytest.approx(math.log(len(visible()) / 9))
    for answer in run_ranks(3, gather, "sample:9", SPLITS[0]):
        assert (answer["rows"], answer["shift"]) == (one["rows"], one["shift"])
    everything = gather("sample:1000", [[0, 12]])
    assert (everything["rows"], everything["shift"]) == (visible(), 0)


def test_a_sample_with_its_shift_stands_for_all() -> None:
    """The sum of exponentials over the sample, shifted, is that over all in the mean."""
    rng = np.random.default_rng(0)
    scores = dict(zip(visible(), rng.normal(size=len(visible())), strict=True))
    found = []
    for update in range(400):
        micro = clips(0, CLIPS)
        ids = np.arange(CLIPS)
        keys = ClipKeys(ids // 3, 5, np.zeros_like(ids), ids + CLIPS * update, np.zeros_like(ids))
        pool = Negatives("sample:8", False).share([MicroBatch.of(micro.clips, keys)], torch.device("cpu")).pool
        assert pool is not None
        rows = [tuple(row) for row in pool.features[:, :2].int().tolist()]
        found.append(sum(math.exp(scores[row] + pool.shift) for row in rows))
    exact = sum(math.exp(score) for score in scores.values())
    assert np.mean(found) == pytest.approx(exact, abs=4 * np.std(found) / math.sqrt(len(found)))
    assert np.mean(found) == pytest.approx(exact, rel=0.1)


def _refused() -> str:
    try:
        Negatives("group:2", False)
    except ConfigError as error:
        return str(error)
    return ""


def test_ranks_that_make_no_groups_are_refused() -> None:
    told = run_ranks(3, _refused)
    assert told == ["train.nce_pool group:2: 3 ranks can't be cut into groups of 2; give a divisor of 3, or global"] * 3


def test_local_has_no_pool_in_common() -> None:
    assert Negatives("local", False).share([clips(0, 12)], torch.device("cpu")).pool is None


@pytest.mark.parametrize("form", ["", "all", "group", "group:0", "sample:", "sample:1.5", "local:3", "sample:-1"])
def test_forms_that_there_are_not(form: str) -> None:
    with pytest.raises(ValidationError, match=r"none of global, local, group:G, sample:K"):
        TrainConfig(nce_pool=form)


def test_forms() -> None:
    assert [pool_form(form) for form in ("global", "local", "group:8", "sample:65536")] == [
        ("global", 0), ("local", 0), ("group", 8), ("sample", 65536),
    ]  # fmt: skip
