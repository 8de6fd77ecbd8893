"""Caption text → word pieces, as BERT cuts them (captions → tokens).

One class over Hugging Face `tokenizers`, rebuilt from vocabulary and casing alone: the same vocabulary is the same
tokenizer (and hash) wherever it came from, and a caption that says "[MASK]" never becomes the special token.
"""

import hashlib
import importlib
import json
import logging
import socket
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Self

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from feature_store.tokenizer_files import parse_settings, parse_tokenizer, read_text
from vlm_dist.errors import ConfigError

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
MAX_ALPHABET = 1000
TRAIN_PREFIX = "wordpiece:"


class Tokenizer:
    """A WordPiece tokenizer; special ids are found by name.

    Args:
        vocab: the pieces; a piece's id is its place.
        lowercase: whether text is lower-cased (and, unless said otherwise, loses its accents).
        strip_accents: None does as `lowercase`.
        name: what it is, for error messages.
    """

    def __init__(
        self, vocab: Sequence[str], lowercase: bool = True, strip_accents: bool | None = None, name: str = "vocabulary"
    ) -> None:
        self._vocab = list(vocab)
        self._lowercase = lowercase
        self._strip_accents = strip_accents
        ids = {piece: number for number, piece in enumerate(self._vocab)}
        missing = [piece for piece in SPECIAL if piece not in ids]
        if missing:
            raise ConfigError(f"{name} has no {', '.join(missing)}: it is not a BERT WordPiece vocabulary")
        self.pad_id, self.unk_id, self.cls_id, self.sep_id, self.mask_id = (ids[piece] for piece in SPECIAL)
        self._backend = _backend(ids, lowercase, strip_accents)
        told = json.dumps([self._vocab, lowercase, strip_accents], ensure_ascii=True)
        self.sha256 = hashlib.sha256(told.encode()).hexdigest()

    def __reduce__(self) -> tuple[type[Self], tuple[list[str], bool, bool | None]]:
        return type(self), (self._vocab, self._lowercase, self._strip_accents)

    @property
    def vocab_size(self) -> int:
        """Number of pieces, special ones included."""
        return len(self._vocab)

    @property
    def pieces(self) -> Sequence[str]:
        """The vocabulary; a piece's id is its place."""
        return self._vocab

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without special tokens."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of several texts, in parallel."""
        return [encoding.ids for encoding in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids, pieces joined to words; special tokens are shown."""
        return self._backend.decode(list(ids), skip_special_tokens=False)

    def save(self, folder: Path) -> None:
        """Writes vocab.txt, tokenizer.json and tokenizer_config.json, which `transformers` understands too."""
        folder.mkdir(parents=True, exist_ok=True)
        whole = tokenizers.Tokenizer.from_str(self._backend.to_str())
        whole.add_special_tokens([*SPECIAL])  # pyright: ignore[reportUnknownMemberType]
        whole.post_processor = processors.BertProcessing(("[SEP]", self.sep_id), ("[CLS]", self.cls_id))
        config = {
            "tokenizer_class": "BertTokenizer",
            "do_lower_case": self._lowercase,
            "strip_accents": self._strip_accents,
            "model_max_length": 512,
            **{f"{token[1:-1].lower()}_token": token for token in SPECIAL},
        }
        (folder / "vocab.txt").write_text("".join(f"{piece}\n" for piece in self._vocab), "utf-8", newline="\n")
        (folder / "tokenizer.json").write_text(whole.to_str(), "utf-8")
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2), "utf-8")


def load_tokenizer(name_or_folder: str) -> Tokenizer:
    """Loads a tokenizer from a folder (tokenizer.json or vocab.txt) or by its Hugging Face name.

    Raises:
        ConfigError: nothing of that name can be loaded here, or it is no BERT WordPiece vocabulary.
    """
    if name_or_folder.startswith(TRAIN_PREFIX):
        raise ConfigError(f"{name_or_folder} is trained while captions are written; load it from the store after that")
    folder = Path(name_or_folder)
    if not folder.is_dir():
        return _from_hub(name_or_folder)
    if (folder / "tokenizer.json").is_file():
        path = folder / "tokenizer.json"
        return Tokenizer(*parse_tokenizer(read_text(path), str(path)), str(path))
    if not (folder / "vocab.txt").is_file():
        raise ConfigError(f"{folder} has neither tokenizer.json nor vocab.txt; give a folder with a BERT vocabulary")
    vocab = read_text(folder / "vocab.txt").split("\n")
    config = folder / "tokenizer_config.json"
    casing = parse_settings(read_text(config), str(config)) if config.is_file() else (True, None)
    return Tokenizer(vocab[:-1] if vocab[-1] == "" else vocab, *casing, str(folder / "vocab.txt"))


def train_wordpiece(texts: Iterable[str], size: int) -> Tokenizer:
    """Trains a lower-casing WordPiece vocabulary; the same texts always give the same one.

    Args:
        texts: is gone through twice; an iterator is held in memory.
        size: pieces, special ones included; fewer come out where the texts do not give as many.

    Raises:
        ConfigError: `size` has no room for the characters of the texts.
    """
    texts = list(texts) if iter(texts) is texts else texts
    normaliser = _normaliser(True, None)
    counts: Counter[str] = Counter()
    stream = iter(texts)
    while batch := list(islice(stream, 1000)):
        counts.update(normaliser.normalize_str(" ".join(batch)))
    alphabet = sorted(c for c, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0])) if not c.isspace())
    if len(alphabet) > MAX_ALPHABET:
        ranked = sorted(alphabet, key=lambda c: (-counts[c], c))
        alphabet = sorted(ranked[:MAX_ALPHABET])
    # The trainer numbers what it meets in the order of a hash table, and breaks ties by number: the result would
    # differ from run to run. Every single character has its number before training, so that nothing is left to chance.
    given = [*SPECIAL, *alphabet, *(f"##{c}" for c in alphabet)]
    if size < len(given):
        raise ConfigError(
            f"{TRAIN_PREFIX}{size} is too small: {len(alphabet)} characters and the special tokens need {len(given)}"
        )
    dropped = dict.fromkeys(map(ord, set(counts) - set(alphabet) - {" "}), " ")
    backend = _backend({piece: number for number, piece in enumerate(SPECIAL)}, True, None)
    trainer = trainers.WordPieceTrainer(vocab_size=size, special_tokens=given, show_progress=False)
    backend.train_from_iterator((normaliser.normalize_str(text).translate(dropped) for text in texts), trainer)
    pieces = backend.get_vocab()
    return Tokenizer(sorted(pieces, key=pieces.__getitem__), name="trained vocabulary")


def _normaliser(lowercase: bool, strip_accents: bool | None) -> normalizers.BertNormalizer:
    return normalizers.BertNormalizer(lowercase=lowercase, strip_accents=strip_accents)


def _backend(ids: dict[str, int], lowercase: bool, strip_accents: bool | None) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.WordPiece(ids, unk_token="[UNK]", max_input_chars_per_word=100))
    backend.normalizer = _normaliser(lowercase, strip_accents)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(prefix="##")
    return backend


def _from_hub(name: str) -> Tokenizer:
    transformers = importlib.import_module("transformers")  # seconds to import, and only for a name
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # a line for every retry of a hub that is out of reach
    for local_only in (True, False):
        if not local_only and not _hub_resolves():
            break  # its retries would take most of a minute to say so
        try:
            loaded = transformers.AutoTokenizer.from_pretrained(name, local_files_only=local_only)
        except (OSError, ValueError):
            continue
        return Tokenizer(*parse_tokenizer(loaded.backend_tokenizer.to_str(), name), name)
    raise ConfigError(
        f"tokenizer {name} is neither a folder here nor to be had from Hugging Face; give a folder with vocab.txt, "
        f"or {TRAIN_PREFIX}N to train one of N pieces on the captions"
    )


def _hub_resolves() -> bool:
    """Whether the hub's name resolves; with a proxy only the proxy knows."""
    if urllib.request.getproxies():
        return True
    endpoint = str(importlib.import_module("huggingface_hub.constants").ENDPOINT)
    try:
        socket.getaddrinfo(urllib.parse.urlsplit(endpoint).hostname, 443)
    except OSError:
        return False
    return True
