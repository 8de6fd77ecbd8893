"""The masked-token losses over words and all video tokens of the global batch (paper Eq. 5-9; reference facts 1.5).

Every rank gets the same pool of raw features, projects it with its own copy of the video MLP, and differentiates its
own rows through that projection. Keys depend on shared parameters and on data only, so the sum of the ranks' gradients
is the exact gradient of the large batch, and the backward pass needs no collective.

Scores of all rows against all words and the pool never exist at once: `chunked_lse` scores one chunk of keys at a time
and scores it again in the backward pass.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint

from vlm_dist.data.batch import ClipBatch
from vlm_dist.model.vlm import VLM

Loss = Literal["joint", "mfm-mlm"]

CHUNK = {"cpu": 2048, "cuda": 8192}
"""Keys scored at once where nobody says otherwise: what is launched on a GPU should be large."""
_FAINTEST = -60.0
"""Logarithm of the smallest share of a key in a gradient, 1e-26. Without it, faint ones are denormal numbers, and CPUs
multiply matrices of those thirty times as slowly."""


@dataclass(frozen=True)
class LossSums:
    """Sums over the masked tokens of one micro-batch; all are scalar tensors, so that nothing waits for the device.

    The sums carry the graph, also when they are empty. `correct_text` counts masked words whose true id scores highest
    of all words, `correct_video` masked seconds whose own video word scores higher than the whole pool.
    """

    text_sum: Tensor
    video_sum: Tensor
    num_text: Tensor
    num_video: Tensor
    correct_text: Tensor
    correct_video: Tensor

    def loss(self, kind: Loss, num_text: float | Tensor, num_video: float | Tensor) -> Tensor:
        """This micro-batch's share of the loss over a global batch with the given numbers of masked tokens.

        The shares of all micro-batches and ranks add up to the loss; multiply by W where W ranks average gradients.
        "joint" weighs every masked token the same (Eq. 8); "mfm-mlm" adds the two modalities' means (Eq. 7).
        """
        if kind == "joint":
            return (self.text_sum + self.video_sum) / _at_least_one(num_text + num_video)
        return self.text_sum / _at_least_one(num_text) + self.video_sum / _at_least_one(num_video)


def masked_token_loss(
    model: VLM,
    hidden: Tensor,
    batch: ClipBatch,
    pool: Tensor,
    loss: Loss = "joint",
    *,
    constant_column: bool = False,
    chunk: int = CHUNK["cpu"],
    shift: float = 0.0,
    videos: tuple[Tensor, Tensor] | None = None,
    compiled: bool = False,
) -> LossSums:
    """Cross-entropy of every masked token of a micro-batch.

    joint (Eq. 8, 9): words and video words compete: text rows [e·E, e·N] with the true word, video rows
    [e·x, e·N, e·E] with the row's own video word x.
    mfm-mlm (Eq. 5-7): text rows [e·E], video rows [e·x, e·N].
    E is the word table (with the model's `word_bias` if it has one: the reference's baseline has, the joint model has
    not), N the projected pool. Masked seconds are no negatives of each other. Scores are raw dot products.

    Args:
        model: gives head, word table and video MLP.
        hidden: (B, 1 + V + T - 1, D) of `model.encode(..., video_labels=batch.video_labels)`.
        batch: the masked clips, features unmasked.
        pool: (N, F) raw visible features of the global batch (`ClipBatch.visible_video` of every rank and micro-batch).
        loss: which loss.
        constant_column: a further score of exactly 0 in every text row of the joint loss, as the reference has it.
        chunk: keys scored at once; the peak memory is masked rows x chunk scores.
        shift: added to the scores of the pool: log(all / N) where it is a sample of all.
        videos: (B,) and (N,) numbers of the videos that the clips and the pool are of: a row then has no negatives of
            its own video. None: it has.
        compiled: see `chunked_lse`.
    """
    at_video, at_text = (states.flatten(0, 1) for states in model.split(hidden, batch.video.shape[1]))
    in_text, in_video = batch.places.masked_text, batch.places.masked_video
    labels = batch.text_labels.flatten()[in_text]
    text = model.head(at_text.index_select(0, in_text))
    video = model.head(at_video.index_select(0, in_video))
    own = model.project_video(batch.video.flatten(0, 1).index_select(0, in_video))
    # The projection of a large pool is computed again in the backward pass: only its output is kept.
    # It has no dropout, so there is no random state to keep.
    keys = torch.cat(
        [
            checkpoint(model.project_video, part, use_reentrant=False, preserve_rng_state=False)
            for part in pool.split(chunk)
        ]
    )
    positive = (_wide(video) * _wide(own)).sum(-1)
    apart = None
    if videos is not None:
        of_text, of_video = in_text // batch.text.shape[1], in_video // batch.video.shape[1]
        rows_of = torch.cat([of_text, of_video]) if loss == "joint" else of_video
        apart = videos[0][rows_of], videos[1]

    if loss == "joint":
        # One pass over each key matrix serves both kinds of rows.
        rows = torch.cat([text, video])
        targets = torch.cat([labels, labels.new_full((len(video),), -1)])
        words = _word_scores(model, rows, targets, chunk, compiled)
        negatives = chunked_lse(rows, keys, None, chunk, apart, compiled)
        both = torch.logaddexp(words.lse, negatives.lse + shift)
        text_lse, video_lse = both.split([len(text), len(video)])
        if constant_column:
            text_lse = torch.logaddexp(text_lse, torch.zeros_like(text_lse))
        target = words.target[: len(text)]
        best_word, best_video = words.best_index[: len(text)], negatives.best[len(text) :]
    else:
        words = _word_scores(model, text, labels, chunk, compiled)
        negatives = chunked_lse(video, keys, None, chunk, apart, compiled)
        text_lse, target, best_word = words.lse, words.target, words.best_index
        video_lse, best_video = negatives.lse + shift, negatives.best
    return LossSums(
        text_sum=(text_lse - target).sum(),
        video_sum=(torch.logaddexp(video_lse, positive) - positive).sum(),
        num_text=in_text.new_full((), len(in_text)),
        num_video=in_video.new_full((), len(in_video)),
        correct_text=(best_word == labels).sum(),
        correct_video=(positive.detach() > best_video).sum(),
    )


@dataclass(frozen=True)
class Scores:
    """What a pass of R queries over K keys leaves: all (R,), the first two with gradient, in at least float32."""

    lse: Tensor  # log-sum-exp of the scores, -inf without keys
    target: Tensor  # score of the row's target key, 0 where it has none
    best: Tensor  # highest score, -inf without keys
    best_index: Tensor  # its key, -1 without keys


def chunked_lse(
    queries: Tensor,
    keys: Tensor,
    targets: Tensor | None,
    chunk: int,
    apart: tuple[Tensor, Tensor] | None = None,
    compiled: bool = False,
) -> Scores:
    """Log-sum-exp of queries·keys over the keys, differentiable in both, one chunk of keys at a time.

    Args:
        queries: (R, D).
        keys: (K, D); K may be 0.
        targets: (R,) int64 index of a key whose score is wanted too, or -1; None is -1 everywhere.
        chunk: keys scored at once.
        apart: (R,) and (K,) numbers: a query does not meet keys of its own number. None: it meets all.
        compiled: let torch.compile fuse what is done to the scores.
    """
    if targets is None:
        targets = torch.full((len(queries),), -1, device=queries.device)
    ours, theirs = apart or (None, None)
    return Scores(*_ChunkedLse.apply(queries, keys, targets, ours, theirs, chunk, compiled))  # pyright: ignore[reportArgumentType]


class _ChunkedLse(torch.autograd.Function):
    """Online softmax over chunks of keys; saves queries, keys and one number a row, and scores again backwards."""

    @staticmethod
    def forward(
        ctx: Any,
        queries: Tensor,
        keys: Tensor,
        targets: Tensor,
        ours: Tensor | None,
        theirs: Tensor | None,
        chunk: int,
        compiled: bool,
    ) -> tuple[Tensor, ...]:
        wide = torch.float64 if queries.dtype == torch.float64 else torch.float32
        best = queries.new_full((len(queries),), -torch.inf, dtype=wide)
        state = best, torch.zeros_like(best), torch.zeros_like(best), torch.full_like(targets, -1)
        fold = _compiled(_fold) if compiled else _fold
        for start, part, numbers in _chunks(keys, theirs, chunk):
            state = fold(queries, part, targets - start, start, ours, numbers, *state)
        best, total, target, best_index = state
        lse = best + total.log()
        ctx.chunk, ctx.compiled = chunk, compiled
        ctx.save_for_backward(queries, keys, targets, ours, theirs, lse)
        ctx.mark_non_differentiable(best, best_index)
        return lse, target, best, best_index

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        queries, keys, targets, ours, theirs, lse = ctx.saved_tensors
        spread = _compiled(_spread) if ctx.compiled else _spread
        of_queries, of_keys = torch.zeros_like(queries, dtype=lse.dtype), torch.empty_like(keys)
        for (start, part, numbers), place in zip(
            _chunks(keys, theirs, ctx.chunk), of_keys.split(ctx.chunk), strict=False
        ):
            of_queries, of_part = spread(
                queries, part, targets - start, ours, numbers, lse, grads[0], grads[1], of_queries
            )
            place.copy_(of_part)
        return of_queries.to(queries.dtype), of_keys, None, None, None, None, None


def _chunks(keys: Tensor, theirs: Tensor | None, chunk: int) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """(number of the first key, keys, their numbers) of each chunk; the first is a tensor, so that one compiled form
    does for all of them."""
    starts = torch.arange(0, len(keys), chunk, device=keys.device)
    numbers = [None] * len(starts) if theirs is None else theirs.split(chunk)
    return zip(starts, keys.split(chunk), numbers, strict=False)  # a split of nothing has one part


def _fold(
    queries: Tensor,
    keys: Tensor,
    columns: Tensor,
    start: Tensor,
    ours: Tensor | None,
    theirs: Tensor | None,
    best: Tensor,
    total: Tensor,
    target: Tensor,
    best_index: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """State of the online softmax after one more chunk of keys; `columns` are the targets' places in it."""
    scores = _scores(queries, keys)
    if ours is not None and theirs is not None:
        scores.masked_fill_(ours[:, None] == theirs, -torch.inf)
    inside, column = _inside(columns, keys)
    target = target + torch.where(inside, scores.gather(1, column).squeeze(1), 0)
    top, index = scores.max(dim=1)
    best_index = torch.where(top > best, index + start, best_index)
    higher = torch.maximum(best, top)
    base = higher.clamp(min=torch.finfo(higher.dtype).min)  # of a row that has met no key yet
    total = total * (best - base).exp() + scores.sub_(base[:, None]).exp_().sum(1)
    return higher, total, target, best_index


def _spread(
    queries: Tensor,
    keys: Tensor,
    columns: Tensor,
    ours: Tensor | None,
    theirs: Tensor | None,
    lse: Tensor,
    of_lse: Tensor,
    of_target: Tensor,
    of_queries: Tensor,
) -> tuple[Tensor, Tensor]:
    """Gradients of the queries, with that of these keys added, and of the keys."""
    weights = _scores(queries, keys).sub_(lse[:, None]).clamp_(min=_FAINTEST).exp_().mul_(of_lse[:, None])
    if ours is not None and theirs is not None:
        weights.masked_fill_(ours[:, None] == theirs, 0)
    inside, column = _inside(columns, keys)
    weights.scatter_add_(1, column, torch.where(inside, of_target, 0)[:, None])
    # Weighted by the gradient before the cast: in fp16 the probabilities alone would vanish.
    narrow = weights.to(queries.dtype)
    return of_queries + narrow @ keys, narrow.T @ queries


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """On GPUs the passes over the scores cost several times their products, and fused ones half of that."""
    return torch.compile(function, dynamic=True)


def _scores(queries: Tensor, keys: Tensor) -> Tensor:
    """(R, D), (C, D) → (R, C) in at least float32, also from half-precision inputs."""
    if queries.is_cuda and queries.dtype in (torch.float16, torch.bfloat16):
        return torch.mm(queries, keys.T, out_dtype=torch.float32)
    return _wide(queries) @ _wide(keys).T


def _inside(columns: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Which targets lie in a chunk, (R,) bool, and their column there, (R, 1), clamped where they do not."""
    return (columns >= 0) & (columns < len(keys)), columns.clamp(0, len(keys) - 1)[:, None]


def _word_scores(model: VLM, rows: Tensor, targets: Tensor, chunk: int, compiled: bool) -> Scores:
    table = model.word_table
    if model.word_bias is not None:
        # The bias is one more coordinate of each word; every row has 1 there.
        table = torch.cat([table, model.word_bias[:, None]], dim=1)
        rows = pad(rows, (0, 1), value=1.0)
    return chunked_lse(rows, table, targets, chunk, compiled=compiled)


def _wide(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()


def _at_least_one(number: float | Tensor) -> float | Tensor:
    return number.clamp(min=1) if isinstance(number, Tensor) else max(number, 1)
