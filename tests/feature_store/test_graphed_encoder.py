"""feature_store.graphed_encoder: which sizes are recorded; on a GPU, the plain network's numbers at each of them."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from feature_store.config import DecodeConfig
from feature_store.graphed_encoder import GraphedEncoder, largest_error, noise_and_black, sizes
from feature_store.s3d_fused import FusedS3D
from feature_store.shared_encoder import SharedEncoder
from tests.feature_store.test_s3d_fused import plain, random_clips, random_model

SMALL = DecodeConfig(fps=16, size=64)


def test_sizes_are_powers_of_two_and_the_largest_batch() -> None:
    assert sizes(64) == [64, 32, 16, 8]
    assert sizes(100) == [100, 64, 32, 16, 8]
    assert sizes(9) == [9, 8]
    assert sizes(8) == [8]
    assert sizes(3) == [3]
    assert sizes(1) == [1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounding_is_no_error_and_a_mixed_up_clip_is(dtype: torch.dtype) -> None:
    model, clips = random_model(), noise_and_black((4, 16, 64, 64, 3))
    black = (clips == 0).flatten(1).all(1)
    assert black.view(2, 2).sum(1).tolist() == [1, 1], "one of each pair"
    exact, got = FusedS3D(model).eager(clips), FusedS3D(model, dtype=dtype).eager(clips)
    assert largest_error(exact, got) < 0.25
    assert largest_error(exact, got[[1, 0, 2, 3]]) > 0.75
    assert largest_error(exact, got * 0) > 0.75
    assert largest_error(exact[:1], got[:1]) < 0.25


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_every_number_of_clips_gives_the_plain_networks_tokens(compiled: bool) -> None:
    model, clips = random_model(), random_clips(20, 16, 64, 64)
    expected = plain(model, clips, "video_embedding")
    encoder = GraphedEncoder(FusedS3D(model, compiled=compiled).cuda(), SMALL, 20)
    for count in (20, 1, 8, 9, 16, 3, 20):  # smaller ones after larger, whose clips are still there
        got = encoder(clips[:count].cuda())
        assert got.shape == (count, 512)
        assert (got.cpu() - expected[:count]).abs().max() < 5e-5


@pytest.mark.gpu
def test_threads_share_a_gpu_and_each_gets_its_own() -> None:
    model, clips = random_model(), random_clips(24, 16, 64, 64)
    expected = plain(model, clips, "video_embedding")
    encoder = SharedEncoder(GraphedEncoder(FusedS3D(model).cuda(), SMALL, 16), 16, join=True)
    parts = [(first, first + 1 + first % 5) for first in range(19)] * 20
    with ThreadPoolExecutor(12) as threads:
        answers = list(threads.map(lambda part: encoder(clips[part[0] : part[1]]), parts))
    for (first, last), tokens in zip(parts, answers, strict=True):
        assert not tokens.is_cuda
        assert (tokens - expected[first:last]).abs().max() < 5e-5
    assert encoder.encoded == sum(last - first for first, last in parts)
    assert encoder.working_s > 0
    encoder.close()
