"""The masked-token losses: parity, exactness over any split of the batch, chunked memory, empty cases."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

from tests.vlm_dist.model.golden import Golden, encode, random_batch, tiny_model
from vlm_dist.data.batch import IGNORE, ClipBatch
from vlm_dist.losses.nce import LossSums, chunked_lse, masked_token_loss
from vlm_dist.model.vlm import VLM

LOSSES = ["joint", "mfm-mlm"]


@pytest.mark.parametrize(("name", "kind"), [("pretrain_mtm", "joint"), ("pretrain_mfmmlm", "mfm-mlm")])
@pytest.mark.parametrize("trim", [False, True])
def test_loss_and_every_gradient_match_the_reference(shared, name, kind, trim):
    golden = Golden(shared, name)
    model, batch = golden.model(), golden.batch()
    batch = batch.trim() if trim else batch
    pool = batch.visible_video()
    sums = masked_token_loss(model, encode(model, batch), batch, pool, kind, constant_column=True, chunk=53)
    loss = sums.loss(kind, batch.num_masked_text, batch.num_masked_video)
    loss.backward()
    torch.testing.assert_close(loss, golden["out/loss"], atol=1e-5, rtol=0)
    expected = golden.gradients()
    named = dict(model.named_parameters())
    assert expected.keys() == named.keys()
    for key, gradient in expected.items():
        torch.testing.assert_close(named[key].grad, gradient, atol=1e-5, rtol=0, msg=lambda m, k=key: f"{k}: {m}")


def materialised(model: VLM, hidden: Tensor, batch: ClipBatch, pool: Tensor, kind: str, constant: bool) -> LossSums:
    """The loss written down as the facts say it (1.5), with all scores at once."""
    at_video, at_text = model.split(hidden, batch.video.shape[1])
    masked = batch.text_labels != IGNORE
    labels = batch.text_labels[masked]
    text, video = model.head(at_text[masked]), model.head(at_video[batch.video_labels])
    own, keys, words = model.project_video(batch.video[batch.video_labels]), model.project_video(pool), model.word_table
    video_rows = [(video * own).sum(1, keepdim=True), video @ keys.T]
    text_rows = [text @ words.T]
    if kind == "joint":
        video_rows.append(video @ words.T)
        text_rows += [text @ keys.T, text.new_zeros(len(text), 1)][: 2 if constant else 1]
    text_scores, video_scores = torch.cat(text_rows, 1), torch.cat(video_rows, 1)
    zeros = torch.zeros(len(video), dtype=torch.int64)
    best_word = (text @ words.T).argmax(1) if len(text) else labels
    rivals = (video @ keys.T).max(1).values if len(keys) else torch.full((len(video),), -torch.inf)
    return LossSums(
        cross_entropy(text_scores, labels, reduction="sum"),
        cross_entropy(video_scores, zeros, reduction="sum"),
        torch.tensor(len(text)), torch.tensor(len(video)),
        (best_word == labels).sum(), ((video * own).sum(1) > rivals).sum(),
    )  # fmt: skip


def gradients(model: VLM, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def spread(model: VLM) -> VLM:
    """Weights large enough that predictions differ and some are right."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
    return model


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize("chunk", [1, 7, 60, 1000])
def test_equals_the_materialised_loss(kind, constant, chunk):
    model, batch = spread(tiny_model()).double(), random_batch(16)
    batch = replace(batch, video=batch.video.double())
    pool = batch.visible_video()
    ours = masked_token_loss(model, encode(model, batch), batch, pool, kind, constant_column=constant, chunk=chunk)
    plain = materialised(model, encode(model, batch), batch, pool, kind, constant)
    for one, other in zip(vars(ours).values(), vars(plain).values(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-10, rtol=1e-12)
    mine, other = gradients(model, ours.loss(kind, 3, 5)), gradients(model, plain.loss(kind, 3, 5))
    assert mine.keys() == other.keys() == dict(model.named_parameters()).keys()
    for name in mine:
        torch.testing.assert_close(mine[name], other[name], atol=1e-10, rtol=1e-12)


def test_counts_what_is_right():
    """Words and seconds that the model surely finds, and surely does not."""
    model, batch = tiny_model(), random_batch(16)
    model.head = torch.nn.Identity()
    hidden = encode(model, batch).detach()
    masked = batch.text_labels != IGNORE
    with torch.no_grad():
        best = (model.split(hidden, 8)[1] @ model.word_table.T).argmax(-1)
        batch = replace(batch, text_labels=torch.where(masked, best, IGNORE))
        batch.text_labels[masked.nonzero()[0].split(1)] += 1
    pool = batch.visible_video()
    sums = masked_token_loss(model, hidden, batch, pool[:0])
    assert int(sums.num_text) == int(masked.sum()) == int(sums.correct_text) + 1
    assert int(sums.num_video) == int(sums.correct_video) == int(batch.video_labels.sum())
    ties = masked_token_loss(model, torch.zeros_like(hidden), batch, batch.video[batch.video_labels])
    assert int(ties.correct_video) == 0, "every score is 0, and a tie is no hit"


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_any_split_into_ranks_and_accumulation_gives_the_large_batch(kind, dtype, tolerance):
    model, batch = tiny_model().to(dtype), random_batch(13, seed=5)
    # A micro-batch in which nothing of the video is visible, and one in which nothing is masked at all.
    batch.video_labels[:2] = batch.video_mask[:2]
    batch.video_labels[9:] = False
    batch.text_labels[9:] = IGNORE
    batch = replace(batch, video=batch.video.to(dtype))
    pool = batch.visible_video()
    counts = batch.num_masked_text, batch.num_masked_video
    whole = masked_token_loss(model, encode(model, batch), batch, pool, kind, chunk=17).loss(kind, *counts)
    expected = gradients(model, whole)

    world, total = 2, torch.zeros((), dtype=dtype)
    averaged = {name: torch.zeros_like(value) for name, value in expected.items()}
    for rank in [(0, 2, 6), (6, 9, 13)]:
        for first, last in pairwise(rank):
            # A rank trims its own micro-batch, and gets the pool of all.
            part = batch[first:last].trim()
            sums = masked_token_loss(model, encode(model, part), part, pool, kind, chunk=11)
            loss = sums.loss(kind, *counts) * world
            total += loss.detach() / world
            for name, gradient in gradients(model, loss).items():
                averaged[name] += gradient / world
    torch.testing.assert_close(total, whole.detach(), atol=tolerance, rtol=tolerance)
    for name, gradient in expected.items():
        error = (averaged[name] - gradient).abs().max()
        assert error <= tolerance * gradient.abs().max().clamp(min=1), name


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("no_pool", [False, True])
@pytest.mark.parametrize("empty", ["text", "video", "both"])
def test_without_masked_tokens_sums_are_zero_and_keep_their_graph(kind, empty, no_pool):
    model, batch = tiny_model(), random_batch(5)
    if empty != "video":
        batch = replace(batch, text_labels=torch.full_like(batch.text_labels, IGNORE))
    if empty != "text":
        batch = replace(batch, video_labels=torch.zeros_like(batch.video_labels))
    pool = batch.visible_video()[: 0 if no_pool else None]
    sums = masked_token_loss(model, encode(model, batch), batch, pool, kind)
    if empty != "video":
        assert (sums.text_sum.item(), int(sums.num_text)) == (0, 0)
    if empty != "text":
        assert (sums.video_sum.item(), int(sums.num_video)) == (0, 0)
    found = gradients(model, sums.loss(kind, batch.num_masked_text, batch.num_masked_video))
    # Every parameter has a gradient, so that ranks reduce the same buckets.
    assert found.keys() == dict(model.named_parameters()).keys()
    assert all(torch.isfinite(gradient).all() for gradient in found.values())


def test_chunked_lse_gradients_are_right():
    torch.manual_seed(0)
    queries = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    keys = torch.randn(9, 6, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([0, 8, -1, 3, 4])

    def both(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        scores = chunked_lse(q, k, targets, 4)
        return scores.lse, scores.target

    assert torch.autograd.gradcheck(both, (queries, keys))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_accumulates_in_float32(dtype):
    torch.manual_seed(0)
    queries, keys = torch.randn(20, 32).to(dtype), torch.randn(500, 32).to(dtype)
    found = chunked_lse(queries, keys, None, 64)
    exact = queries.double() @ keys.double().T
    assert found.lse.dtype == torch.float32
    torch.testing.assert_close(found.lse.double(), exact.logsumexp(1), atol=1e-5, rtol=0)
    assert torch.equal(found.best_index, exact.argmax(1))


class LargestTensor(TorchDispatchMode):
    """Remembers the most numbers that any new tensor of two or more axes holds."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor) and tensor.dim() >= 2:
                self.numel = max(self.numel, tensor.numel())
        return out


@pytest.mark.parametrize("kind", LOSSES)
def test_scores_never_exist_at_once(kind):
    vocab, chunk = 3000, 64
    model = tiny_model(vocab_size=vocab)
    batch = random_batch(96, vocab=vocab)
    hidden = encode(model, batch).detach().requires_grad_()
    pool = torch.randn(2500, 16)
    rows = batch.num_masked_text + batch.num_masked_video
    with LargestTensor() as largest:
        sums = masked_token_loss(model, hidden, batch, pool, kind, chunk=chunk)
        sums.loss(kind, 1, 1).backward()
    # The word table's own gradient is the largest; scores are rows x chunk, where all of them would be rows x 5,500.
    assert largest.numel <= max(rows * chunk, model.word_table.numel())
    assert largest.numel * 8 < rows * (vocab + len(pool))
    with LargestTensor() as largest:
        materialised(model, hidden, batch, pool, "joint", False)
    assert largest.numel >= rows / 2 * (vocab + len(pool)), "the measure sees the materialised form"


def test_saves_only_inputs_for_the_backward_pass():
    saved: list[int] = []
    queries, keys = torch.randn(200, 8, requires_grad=True), torch.randn(5000, 8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        chunked_lse(queries, keys, None, 100)
    assert saved
    assert max(saved) == keys.numel()


@pytest.mark.slow
@pytest.mark.parametrize("apart", [False, True])
def test_fused_passes_give_the_same(apart):
    """GPUs run them; here the compiler makes C++ of them."""

    def run(compiled: bool, rows: int, number: int) -> list[Tensor]:
        rng = torch.Generator().manual_seed(rows)
        queries = torch.randn(rows, 24, generator=rng, requires_grad=True)
        keys = torch.randn(number, 24, generator=rng, requires_grad=True)
        targets = torch.randint(-1, max(1, number), (rows,), generator=rng) if number else None
        groups = [torch.randint(0, 3, (size,), generator=rng) for size in (rows, number)]
        scores = chunked_lse(queries, keys, targets, 100, (groups[0], groups[1]) if apart else None, compiled)
        ((scores.lse.clamp(min=-9) * torch.arange(rows)).sum() + 3 * scores.target.sum()).backward()
        return [scores.lse, scores.target, scores.best, scores.best_index, queries.grad, keys.grad]

    for rows, number in ((20, 350), (33, 420), (7, 100), (5, 99), (3, 0)):
        for found, expected in zip(run(True, rows, number), run(False, rows, number), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_on_a_gpu_accumulates_in_float32(dtype):
    torch.manual_seed(0)
    queries = torch.randn(40, 64, device="cuda").to(dtype).requires_grad_()
    keys = torch.randn(3000, 64, device="cuda").to(dtype).requires_grad_()
    found = chunked_lse(queries, keys, None, 512).lse
    found.sum().backward()
    wide = [tensor.detach().double().requires_grad_() for tensor in (queries, keys)]
    exact = (wide[0] @ wide[1].T).logsumexp(1)
    exact.sum().backward()
    torch.testing.assert_close(found.double(), exact, atol=1e-4, rtol=0)
    for half, full in zip((queries, keys), wide, strict=True):
        torch.testing.assert_close(half.grad.double(), full.grad, atol=0.05, rtol=0.02)


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_model_has_nearly_the_same_loss(kind, dtype):
    model, batch = tiny_model(), random_batch(16)
    batch = replace(batch, video=batch.video.half())
    exact = masked_token_loss(model, encode(model, batch), batch, batch.visible_video(), kind).loss(kind, 10, 10)
    model.to(dtype)
    loss = masked_token_loss(model, encode(model, batch), batch, batch.visible_video(), kind).loss(kind, 10, 10)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, exact, rtol=0.01, atol=0)
    found = gradients(model, loss)
    assert found.keys() == dict(model.named_parameters()).keys()
    assert all(gradient.dtype == dtype and torch.isfinite(gradient).all() for gradient in found.values())


def test_gradients_of_far_keys_are_no_denormal_numbers():
    """Keys that score 95 below the best have shares of 1e-41: a product over them takes thirty times as long."""
    queries = torch.ones(3, 1, requires_grad=True)
    keys = torch.tensor([[0.0], [-95.0], [-96.0]], requires_grad=True)
    lse = chunked_lse(queries, keys, None, 2).lse
    lse.sum().backward()
    assert keys.grad is not None
    assert (keys.grad.abs() > torch.finfo(torch.float32).tiny).all()
    torch.testing.assert_close(keys.grad[:1], torch.full((1, 1), 3.0))
    assert keys.grad[1:].max() < 1e-25


@pytest.mark.parametrize("kind", LOSSES)
def test_other_videos_only_and_a_shift_equal_the_naive_form(kind):
    """Rows against the pool without their own video, its scores shifted; one row of text has no negatives left."""
    model = tiny_model().double()
    batch = random_batch(6, seed=8)
    batch = replace(batch, video=batch.video.double())
    clip_of = torch.tensor([0, 1, 0, 2, 1, 3])
    visible = batch.video_mask & ~batch.video_labels
    pool, of_pool = batch.visible_video(), clip_of[:, None].expand_as(visible)[visible]
    only = of_pool == 1  # clips 1 and 4 meet nobody
    for features, numbers in ((pool, of_pool), (pool[only], of_pool[only])):
        sums = masked_token_loss(
            model, encode(model, batch), batch, features, kind, chunk=5, shift=0.7, videos=(clip_of, numbers)
        )
        hidden = encode(model, batch)
        at_video, at_text = model.split(hidden, batch.video.shape[1])
        keys, words = model.project_video(features), model.word_table
        text_sum = video_sum = torch.zeros((), dtype=torch.float64)
        for clip in range(6):
            others = keys[numbers != clip_of[clip]]
            for place in (batch.text_labels[clip] != IGNORE).nonzero()[:, 0]:
                row = model.head(at_text[clip, place])
                scores = torch.cat([words @ row, others @ row + 0.7]) if kind == "joint" else words @ row
                text_sum = text_sum + scores.logsumexp(0) - scores[batch.text_labels[clip, place]]
            for second in batch.video_labels[clip].nonzero()[:, 0]:
                row = model.head(at_video[clip, second])
                own = model.project_video(batch.video[clip, second]) @ row
                scores = torch.cat([own[None], others @ row + 0.7, *([words @ row] if kind == "joint" else [])])
                video_sum = video_sum + scores.logsumexp(0) - own
        torch.testing.assert_close(sums.text_sum, text_sum, atol=1e-10, rtol=1e-12)
        torch.testing.assert_close(sums.video_sum, video_sum, atol=1e-10, rtol=1e-12)
        mine = gradients(model, sums.text_sum + 2 * sums.video_sum)
        naive = gradients(model, text_sum + 2 * video_sum)
        for name, gradient in mine.items():
            torch.testing.assert_close(gradient, naive[name], atol=1e-9, rtol=1e-9, msg=name)
