"""Where a model's weights come from and where they go: scratch, BERT, the reference's files, and folders of our own."""

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from vlm_dist.errors import CheckpointError
from vlm_dist.model.config import ModelConfig
from vlm_dist.model.foreign import ForeignWeights, read_bert, read_json, read_reference, read_safetensors
from vlm_dist.model.origin import TrainedOn
from vlm_dist.model.vlm import VLM

if TYPE_CHECKING:
    from feature_store.records import Provenance
    from feature_store.tokenizer import Tokenizer

log = logging.getLogger(__name__)

_FORMAT = "vlm-dist model 1"


@dataclass(frozen=True)
class LoadedVLM:
    """A model in evaluation mode with the tokenizer that it was trained with."""

    model: VLM
    tokenizer: "Tokenizer"

    @property
    def config(self) -> ModelConfig:
        """Sizes and variants of the model."""
        return self.model.config


def build_vlm(init: str, config: ModelConfig, vocab_size: int, feature_dim: int, seed: int) -> VLM:
    """Make a model for a store's tokenizer and features; its final sizes are in `.config`.

    Args:
        init: "scratch"; a folder of `save_vlm`; a folder with a Hugging Face BERT, or the name of one; or a checkpoint
            file of the reference implementation.
        config: variants, and sizes where init does not decide them. A folder of `save_vlm` decides all but dropout.
        vocab_size: ids of the store's tokenizer.
        feature_dim: width of the store's features.
        seed: of the weights that init does not give; the caller's random state is left alone.

    Raises:
        CheckpointError: init is absent, damaged, or does not fit tokenizer, features or configuration.
    """
    wanted = {"vocab_size": vocab_size, "feature_dim": feature_dim}
    if init == "scratch":
        return _fresh(_sized(config, wanted, init), seed)
    path = locate(init)
    fresh: tuple[str, ...] = ()
    if path.is_file():
        weights = read_reference(path)
    elif is_exported(path):
        own, tensors = _read_own(path)
        weights = ForeignWeights({**own.model_dump(), "dropout": config.dropout}, tensors)
    else:
        weights = read_bert(path)
        fresh = ("video_mlp.", "head.")
    for name, size in wanted.items():
        if weights.sizes.get(name, size) != size:
            what = "word pieces" if name == "vocab_size" else "feature width"
            raise CheckpointError(
                f"{init} has {weights.sizes[name]} {what}, the store has {size}: take the "
                + ("store's captions with this model's tokenizer" if name == "vocab_size" else "store it was made for")
            )
    sized = _sized(config, {**wanted, **weights.sizes}, init)
    tensors = dict(weights.tensors)
    if not is_exported(path):
        if sized.head == "paper":
            # The paper's linear head is not BERT's transform, so it always starts fresh.
            tensors = {key: value for key, value in tensors.items() if not key.startswith("head.")}
            fresh += ("head.",)
        if not sized.decoder_bias and tensors.pop("word_bias", None) is not None:
            log.info("%s: cls.predictions.bias left out: the decoder has no bias", init)
        elif sized.decoder_bias:
            fresh += ("word_bias",)
    model = _fresh(sized, seed)
    _fill(model, tensors, init, fresh)
    return model


def save_vlm(
    model: VLM,
    tokenizer: "Tokenizer",
    folder: Path,
    *,
    features: "Provenance | None" = None,
    trained_on: TrainedOn | None = None,
) -> None:
    """Write model.safetensors, config.json and the tokenizer's files into a folder, for `load` and `build_vlm`.

    Args:
        model: weights and sizes.
        tokenizer: of its texts.
        folder: is made.
        features: what made the features that it was trained on, for `origin.check_features`.
        trained_on: the videos that it was trained on, for `origin.read_trained_on`.

    Raises:
        CheckpointError: the disk refuses.
    """
    tensors = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    described = {"format": _FORMAT, "model": model.config.model_dump()}
    if features is not None:
        described["features"] = features.model_dump(mode="json")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        tokenizer.save(folder)
        if trained_on is not None:
            trained_on.write(folder)
        # Last: a folder with this file is whole.
        (folder / "config.json").write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"the model could not be written to {folder}: {error}") from error


def load(path: str | Path) -> LoadedVLM:
    """Load a folder of `save_vlm` for inference, on the CPU in float32.

    Raises:
        CheckpointError: the folder is absent, damaged, of another format, or its tokenizer is of another size.
    """
    from feature_store.tokenizer import load_tokenizer

    folder = Path(path).expanduser()
    if not is_exported(folder):
        read_json(folder / "config.json")
        raise CheckpointError(f"{folder} is no exported VLM (its config.json has no format {_FORMAT!r})")
    config, tensors = _read_own(folder)
    tokenizer = load_tokenizer(str(folder))
    if tokenizer.vocab_size != config.vocab_size:
        raise CheckpointError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} word pieces, the model {config.vocab_size}"
        )
    model = _fresh(config, 0)
    _fill(model, tensors, str(folder), ())
    return LoadedVLM(model.eval(), tokenizer)


def is_exported(folder: Path) -> bool:
    """Whether a folder holds what `save_vlm` wrote."""
    return (folder / "config.json").is_file() and read_json(folder / "config.json").get("format") == _FORMAT


def _read_own(folder: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    try:
        config = ModelConfig.model_validate(read_json(folder / "config.json").get("model"))
    except ValidationError as error:
        raise CheckpointError(f"{folder / 'config.json'} is not valid: {_first(error)}") from error
    return config, read_safetensors(folder / "model.safetensors")


def locate(init: str) -> Path:
    """The file or folder that `init` names: here, or a Hugging Face BERT in the local cache, fetched if need be.

    Raises:
        CheckpointError: there is no such file, folder or model.
    """
    path = Path(init).expanduser()
    return path if path.exists() else _download(init)


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download

    if name.count("/") > 1 or name.startswith((".", "/", "~")) or Path(name).suffix in (".pt", ".pth", ".bin"):
        raise CheckpointError(f"there is no file or folder {name}")
    try:
        folder = Path(snapshot_download(name, allow_patterns=["config.json", "model.safetensors"]))
        if not (folder / "model.safetensors").is_file():
            folder = Path(snapshot_download(name, allow_patterns=["config.json", "pytorch_model.bin"]))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"cannot get the model {name!r}: it is no file or folder here, not in the Hugging Face cache, and the hub "
            f"did not give it ({str(error).strip().splitlines()[0]}). Give a folder with a BERT, or 'scratch'"
        ) from error
    return folder


def _sized(config: ModelConfig, sizes: dict[str, Any], init: str) -> ModelConfig:
    try:
        return ModelConfig.model_validate({**config.model_dump(), **sizes})
    except ValidationError as error:
        raise CheckpointError(f"{init} does not fit the configuration: {_first(error)}") from error


def _first(error: ValidationError) -> str:
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc']))} {first['msg']}".strip()


def _fresh(config: ModelConfig, seed: int) -> VLM:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return VLM(config)


def _fill(model: VLM, tensors: dict[str, Tensor], where: str, fresh: tuple[str, ...]) -> None:
    """Copy tensors into the model as float32; only names that begin with one of `fresh` may be missing."""
    own = model.state_dict()
    missing = sorted(own.keys() - tensors.keys())
    left = [key for key in missing if not key.startswith(fresh)] if fresh else missing
    problems = [f"lacks {', '.join(left)}"] if left else []
    if surplus := sorted(tensors.keys() - own.keys()):
        problems.append(f"has {', '.join(surplus)}, which VLM has not")
    for key in own.keys() & tensors.keys():
        if own[key].shape != tensors[key].shape:
            problems.append(f"has {key} of shape {tuple(tensors[key].shape)}, not {tuple(own[key].shape)}")
        elif not torch.isfinite(tensors[key]).all():
            problems.append(f"has values that are not finite in {key}")
    if problems:
        raise CheckpointError(f"{where} {'; it '.join(problems)}")
    if missing:
        log.warning("%s does not hold %s: freshly initialised", where, ", ".join(missing))
    model.load_state_dict({key: value.float() for key, value in tensors.items()}, strict=False)
