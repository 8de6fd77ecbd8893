"""Files of a Hugging Face tokenizer → vocabulary and casing, which are all that makes a tokenizer.py tokenizer."""

from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from vlm_dist.errors import ConfigError

# Other ways to say what BERT's normaliser does: (lowercase, strip_accents).
_CASINGS: dict[tuple[str, ...], tuple[bool, bool]] = {
    (): (False, False),
    ("Lowercase",): (True, False),
    ("NFD", "StripAccents"): (False, True),
    ("NFD", "Lowercase", "StripAccents"): (True, True),
    ("NFD", "StripAccents", "Lowercase"): (True, True),
}


def read_text(path: Path) -> str:
    """A text file; ConfigError where it is not UTF-8."""
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start})") from None


class _Settings(BaseModel):
    """tokenizer_config.json, as far as it matters here."""

    do_lower_case: bool = True
    strip_accents: bool | None = None


class _Normaliser(BaseModel):
    type: str
    lowercase: bool = True
    strip_accents: bool | None = None
    clean_text: bool = True
    handle_chinese_chars: bool = True
    normalizers: list["_Normaliser"] = []


class _Model(BaseModel):
    type: str = "WordPiece"
    continuing_subword_prefix: str = ""
    vocab: dict[str, int]


class _Whole(BaseModel):
    """tokenizer.json, as far as it matters here."""

    model: _Model
    normalizer: _Normaliser | None = None


_Form = TypeVar("_Form", bound=BaseModel)


def _parse(form: type[_Form], text: str, name: str) -> _Form:
    try:
        return form.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the file"
        fetch = "; it is a pointer of Git-LFS, `git lfs pull` fetches the file" if "git-lfs" in text[:50] else ""
        raise ConfigError(f"{name} is no tokenizer of BERT's kind: {place}: {first['msg']}{fetch}") from None


def parse_settings(text: str, name: str) -> tuple[bool, bool | None]:
    """`lowercase` and `strip_accents` of a tokenizer_config.json; ConfigError where it cannot be understood."""
    settings = _parse(_Settings, text, name)
    return settings.do_lower_case, settings.strip_accents


def parse_tokenizer(text: str, name: str) -> tuple[list[str], bool, bool | None]:
    """Pieces in the order of their ids, `lowercase` and `strip_accents` of a tokenizer.json.

    Raises:
        ConfigError: not JSON, or not a BERT WordPiece vocabulary with a normaliser that does what BERT's does.
    """
    whole = _parse(_Whole, text, name)
    model, ids = whole.model, whole.model.vocab
    if model.type != "WordPiece" or model.continuing_subword_prefix != "##":
        raise ConfigError(f"{name} is a {model.type} tokenizer; VLM takes a BERT WordPiece vocabulary")
    if sorted(ids.values()) != list(range(len(ids))):
        raise ConfigError(f"{name}: its ids are not 0 to {len(ids) - 1}; give a whole vocabulary")
    return sorted(ids, key=ids.__getitem__), *_casing(whole.normalizer, name)


def _casing(normaliser: _Normaliser | None, name: str) -> tuple[bool, bool | None]:
    """`lowercase` and `strip_accents` of a normaliser; without one, text keeps both."""
    steps = [normaliser] if normaliser else []
    if normaliser and normaliser.type == "Sequence":
        steps = normaliser.normalizers
    kinds = tuple(step.type for step in steps)
    if kinds == ("BertNormalizer",) and steps[0].clean_text and steps[0].handle_chinese_chars:
        return steps[0].lowercase, steps[0].strip_accents
    if kinds not in _CASINGS:
        said = normaliser.model_dump_json(exclude_defaults=True) if normaliser else ""
        raise ConfigError(f"{name}: its normalizer is not BERT's: {said}; give a tokenizer with a BertNormalizer")
    return _CASINGS[kinds]
