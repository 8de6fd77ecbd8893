"""Weights made elsewhere, under this project's names: plain BERT and the paper's reference checkpoints (facts 6)."""

import argparse
import json
import logging
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from vlm_dist.errors import CheckpointError

log = logging.getLogger(__name__)

_RENAMED = (
    ("videomlp.", "video_mlp."),
    ("cls.predictions.transform.", "head."),
    ("cls.predictions.bias", "word_bias"),
)
# Parts of BERT and of the reference that no VLM task uses, and buffers.
_UNUSED = (
    "bert.embeddings.position_ids",
    "bert.embeddings.seg_embeddings.weight",
    "bert.pooler.",
    "cls.predictions.decoder.bias",
    "cls.seq_relationship.",
)
_WORDS = "bert.embeddings.word_embeddings.weight"
_DECODER = "cls.predictions.decoder.weight"


@dataclass(frozen=True)
class ForeignWeights:
    """Tensors by this project's parameter names, and the fields of `ModelConfig` that they decide."""

    sizes: dict[str, Any]
    tensors: dict[str, Tensor]


def read_bert(folder: Path) -> ForeignWeights:
    """Read a Hugging Face BERT folder: config.json beside model.safetensors or pytorch_model.bin.

    Raises:
        CheckpointError: the folder is incomplete, damaged, or holds another architecture.
    """
    config = read_json(folder / "config.json")
    if config.get("model_type") != "bert" or config.get("position_embedding_type", "absolute") != "absolute":
        raise CheckpointError(
            f"{folder} holds a model of type {config.get('model_type')!r}; only BERT with absolute positions fits"
        )
    if (folder / "model.safetensors").is_file():
        raw = read_safetensors(folder / "model.safetensors")
    elif (folder / "pytorch_model.bin").is_file():
        raw = _load_pickle(folder / "pytorch_model.bin")
    else:
        raise CheckpointError(f"{folder} has neither model.safetensors nor pytorch_model.bin")
    try:
        sizes = {
            "hidden_size": config["hidden_size"],
            "num_layers": config["num_hidden_layers"],
            "num_heads": config["num_attention_heads"],
            "intermediate_size": config["intermediate_size"],
            "max_positions": config["max_position_embeddings"],
            "vocab_size": config["vocab_size"],
            "activation": config.get("hidden_act", "gelu"),
            "layer_norm_eps": config.get("layer_norm_eps", 1e-12),
        }
    except KeyError as error:
        raise CheckpointError(f"{folder / 'config.json'} has no {error}") from None
    # A bare encoder has no "bert." in front; the oldest files call LayerNorm's tensors gamma and beta.
    bare = not any(key.startswith("bert.") for key in raw)
    prefix = "bert." if bare else ""
    named = {prefix + _modern(key): tensor for key, tensor in raw.items()}
    return ForeignWeights(sizes, _translate(named, folder))


def read_reference(file: Path) -> ForeignWeights:
    """Read a checkpoint of the paper's reference implementation (fairseq form, `mmmodel.mm_encoder.` keys).

    The file does not say how many attention heads it has; the configuration does.

    Raises:
        CheckpointError: the file cannot be read without running code in it, or it is no such checkpoint.
    """
    raw = _load_pickle(file)
    named = {key.removeprefix("mmmodel.").removeprefix("mm_encoder."): tensor for key, tensor in raw.items()}
    tensors = _translate(named, file)
    needed = (_WORDS, "bert.embeddings.position_embeddings.weight", "video_mlp.linear1.weight")
    intermediate = "bert.encoder.layer.0.intermediate.dense.weight"
    missing = [key for key in (*needed, intermediate) if key not in tensors]
    if missing:
        raise CheckpointError(f"{file} is no VLM checkpoint: it lacks {', '.join(missing)}")
    layers = {key.split(".")[3] for key in tensors if key.startswith("bert.encoder.layer.")}
    sizes = {
        "vocab_size": tensors[_WORDS].shape[0],
        "hidden_size": tensors[_WORDS].shape[1],
        "max_positions": tensors[needed[1]].shape[0],
        "feature_dim": tensors[needed[2]].shape[-1],
        "intermediate_size": tensors[intermediate].shape[0],
        "num_layers": len(layers),
    }
    return ForeignWeights(sizes, tensors)


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object; CheckpointError names a file that is absent or is none."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{file.parent} is no model folder: it has no {file.name}") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} holds no JSON object")
    return value


def read_safetensors(file: Path) -> dict[str, Tensor]:
    """Read a safetensors file; CheckpointError names one that is absent or damaged."""
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error


def _modern(key: str) -> str:
    return key.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")


def _load_pickle(file: Path) -> dict[str, Tensor]:
    """The state dict of a PyTorch file, loaded without running anything in it but argparse.Namespace."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            value = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        raise CheckpointError(
            f"{file} is refused: "
            + (f"it holds a Python object, {found[1]}, that could run code" if found else "it is no PyTorch checkpoint")
            + ". Save its state dict alone and try again"
        ) from error
    except Exception as error:  # a damaged pickle can fail in any way
        raise CheckpointError(f"{file} cannot be read as a PyTorch checkpoint: {error}") from error
    for key in ("model", "state_dict"):
        if isinstance(value, Mapping) and isinstance(value.get(key), Mapping):
            value = value[key]
            break
    if not isinstance(value, Mapping) or not value:
        raise CheckpointError(f"{file} holds no state dict")
    wrong = [str(key) for key, tensor in value.items() if not (isinstance(key, str) and isinstance(tensor, Tensor))]
    if wrong:
        raise CheckpointError(f"{file} holds no state dict: {', '.join(wrong[:5])} are no tensors")
    return dict(value)


def _translate(named: dict[str, Tensor], where: Path) -> dict[str, Tensor]:
    """Rename tensors, drop and log what VLM does not use, and check that the decoder is the word table."""
    tensors: dict[str, Tensor] = {}
    unused: list[str] = []
    for key, tensor in named.items():
        if key.startswith(_UNUSED):
            unused.append(key)
        elif key == _DECODER:
            if _WORDS not in named or not torch.equal(tensor, named[_WORDS]):
                raise CheckpointError(f"{where}: {_DECODER} differs from the word table, and VLM has them tied")
        else:
            for old, new in _RENAMED:
                if key.startswith(old):
                    key = new + key.removeprefix(old)
                    break
            tensors[key] = tensor
    if unused:
        log.info("%s: not used by VLM and left out: %s", where, ", ".join(sorted(unused)))
    return tensors
