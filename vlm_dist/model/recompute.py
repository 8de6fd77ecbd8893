"""Which of the encoder's activations are kept for the backward pass, and which are made again (inside the model).

A BERT layer keeps some 20 values a token and hidden unit: inputs and outputs of its products, of GELU and of LayerNorm,
padded rows of the attention. The products' outputs are 10 of them, and all others follow from these at little cost.
"""

from functools import partial
from typing import Any, Literal

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers import BertModel

Recompute = Literal["none", "cheap", "layers"]

# Attention is not among them, though it costs more than the rest: it draws random numbers for its dropout, and what
# is drawn after it is the same the second time only if it draws its own again.
_KEPT = (torch.ops.aten.addmm.default, torch.ops.aten.mm.default)


def set_recompute(bert: BertModel, kind: Recompute) -> None:
    """Says what training makes again in its backward pass; gradients are the same to the last bit.

    Args:
        bert: the encoder.
        kind: "none"; "cheap": everything but the layers' matrix products (half the memory, some percent of the time);
            "layers": whole layers, of which only the inputs are kept (a third of the time).
    """
    again: Any = partial(checkpoint, use_reentrant=False)
    if kind == "cheap":
        again = partial(again, context_fn=partial(create_selective_checkpoint_contexts, _policy))
    layer: Any
    for layer in bert.encoder.layer:
        layer.gradient_checkpointing = kind != "none"
        layer._gradient_checkpointing_func = again


def _policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE
