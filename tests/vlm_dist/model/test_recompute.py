"""Activations made again: the same states and gradients, dropout included, and less that is kept."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.vlm_dist.model.golden import encode, random_batch, tiny_model
from vlm_dist.model.recompute import Recompute, set_recompute

BATCH = random_batch(12, seed=3)


def step(kind: Recompute) -> tuple[Tensor, dict[str, Tensor], int]:
    """Hidden states and gradients of a training step with dropout, and the bytes that the forward pass left."""
    model = tiny_model(dropout=0.1).train()
    set_recompute(model.bert, kind)
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    torch.manual_seed(1)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = encode(model, BATCH)
    size = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    hidden.square().sum().backward()
    return hidden.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, size


@pytest.mark.parametrize("kind", ["cheap", "layers"])
def test_states_and_gradients_are_the_same_to_the_last_bit(kind: Recompute) -> None:
    states, gradients, _ = step("none")
    again, same, _ = step(kind)
    assert torch.equal(states, again)
    assert gradients.keys() == same.keys()
    for name, gradient in gradients.items():
        assert torch.equal(gradient, same[name]), name


class Counted(TorchDispatchMode):
    """Counts the operations that are computed."""

    def __init__(self) -> None:
        super().__init__()
        self.of: Counter[Any] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.of[func] += 1
        return func(*args, **(kwargs or {}))


def test_what_is_computed_again() -> None:
    """Products are not, unless whole layers are."""
    counts: dict[str, Counter[Any]] = {}
    for kind in ("none", "cheap", "layers"):
        model = tiny_model().train()
        set_recompute(model.bert, kind)
        with Counted() as counted:
            encode(model, BATCH).sum().backward()
        counts[kind] = counted.of
    product, gelu = torch.ops.aten.addmm.default, torch.ops.aten.gelu.default
    layers = 3
    assert counts["cheap"][product] == counts["none"][product]
    assert counts["cheap"][gelu] == counts["none"][gelu] + layers
    assert counts["layers"][product] == counts["none"][product] + 6 * layers
    assert counts["layers"][gelu] == counts["none"][gelu] + layers


def test_less_is_kept() -> None:
    everything, whole_layers = step("none")[2], step("layers")[2]
    assert whole_layers < 0.5 * everything


def test_none_undoes_it() -> None:
    model = tiny_model().train()
    set_recompute(model.bert, "layers")
    set_recompute(model.bert, "none")
    assert not any(layer.gradient_checkpointing for layer in model.bert.encoder.layer)
