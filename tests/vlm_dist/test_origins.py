"""`--from`, `--store`, `--init`: which model, which features, and whether the two and the test fit (real commands)."""

import json
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking import MlflowClient

from feature_store.captions import write_captions
from feature_store.config import CaptionConfig
from feature_store.reader import FeatureReader
from tests.vlm_dist.tasks import world
from vlm_dist.cli.app import main
from vlm_dist.model.checkpoint import save_vlm
from vlm_dist.model.origin import TRAINED_ON, TrainedOn
from vlm_dist.tasks.checkpoint import save_head

SETTINGS = """
[cluster]
tracking_uri = "{uri}"
[model]
hidden_size = 32
num_layers = 1
num_heads = 2
intermediate_size = 64
max_video_len = 8
max_len = 24
[data.retrieval]
data = "clips.jsonl"
store = "other"
"""


class Place:
    """A workspace with two stores of the same videos, of two extractors; the task's own store is `other`."""

    def __init__(self, folder: Path, uri: str) -> None:
        self.folder, self.uri = folder, uri
        self.reader, self.data = world.clip_world(folder)
        names = [self.reader.index.video_id(v) for v in range(self.reader.index.num_videos)]
        features = {name: world.random_rows(n, 9) for n, name in enumerate(names)}
        self.other = world.make_store(folder / "other", features, weights="1" * 64)
        self.tokenizer = world.make_tokenizer()
        self.tokenizer.save(folder / "words")
        (folder / "vlm-dist.toml").write_text(SETTINGS.format(uri=uri))
        said = {names[0]: {"start": [0.0], "end": [2.0], "text": ["cut the red thing"]}}
        (folder / "captions.json").write_text(json.dumps(said))
        write_captions(folder / "other", folder / "captions.json", CaptionConfig(tokenizer=str(folder / "words")))
        lines = [json.loads(line) for line in self.data.read_text().splitlines()]
        self.test_ids = [line["video_id"] for line in lines if line["split"] == "test"]

    def model(self, name: str, **origin: Any) -> str:
        """An exported model."""
        save_vlm(world.make_vlm(self.tokenizer), self.tokenizer, self.folder / name, **origin)
        return str(self.folder / name)

    def tags(self, run: str) -> dict[str, str]:
        """Tags of a run."""
        return MlflowClient(self.uri).get_run(run).data.tags


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, uri: str) -> Place:
    return Place(tmp_path_factory.mktemp("origins"), uri)


@pytest.fixture
def run(place: Place, capsys: pytest.CaptureFixture[str]) -> Any:
    """Type a command; gives its JSON (None after an error) and what it said on stderr."""

    def typed(*words: str, code: int = 0) -> tuple[Any, str]:
        found = main([*words, "--json", "--workspace", str(place.folder)])
        printed = capsys.readouterr()
        assert found == code, printed.err
        return (json.loads(printed.out) if printed.out else None), " ".join(printed.err.split())

    return typed


def test_features_of_another_extractor_are_refused(place: Place, run: Any) -> None:
    model = place.model("of-store", features=place.reader.meta.provenance)
    for words in (("evaluate", "retrieval", "--from", model), ("finetune", "retrieval", "--gpus", "0", "--from", model),
                  ("pretrain", "--init", model, "--gpus", "0", "--store", str(place.folder / "other"))):  # fmt: skip
        _, said = run(*words, code=1)
        assert "weights_sha256 is 000000000000… for the model and 111111111111… in the store" in said, words
        assert "train.allow_other_features=true" in said
        assert "window" not in said
    _, said = run("evaluate", "retrieval", "--from", model, "--set", "train.allow_other_features=true")
    assert "warning: the features in" in said
    _, said = run("evaluate", "retrieval", "--from", place.model("older"))
    assert "does not say which features it was trained on" in said


def test_the_store_on_the_command_line_wins(place: Place, run: Any) -> None:
    model = place.model("of-store", features=place.reader.meta.provenance)
    for words, store in (((), "other"), (("--store", str(place.folder / "store")), "store")):
        result, _ = run("evaluate", "retrieval", "--from", model, "--set", "train.allow_other_features=true", *words)
        fingerprint = FeatureReader(place.folder / store).index.fingerprint
        assert place.tags(result["run"])["vlm_dist.store_fingerprint"] == fingerprint


@pytest.mark.parametrize(
    ("known", "tag", "said"),
    [
        (("none of them", True), "0", ""),
        (("test", True), "12", "12 test videos of clips.jsonl were trained on"),
        (("test", False), "at least 12", "12 test videos of clips.jsonl were trained on"),
        (("none of them", False), "unknown", "is unknown"),
        (None, "unknown", "is unknown"),
        (b"damaged", "unknown", "cannot be read"),
    ],
)
def test_test_videos_that_a_model_was_trained_on(place: Place, run: Any, known: Any, tag: str, said: str) -> None:
    model = place.model("seen", features=place.other.meta.provenance)
    (Path(model) / TRAINED_ON).unlink(missing_ok=True)
    if isinstance(known, bytes):
        (Path(model) / TRAINED_ON).write_bytes(known)
    elif known:
        TrainedOn.of(place.test_ids if known[0] == "test" else ["x"], known[1]).write(Path(model))
    result, warned = run("evaluate", "retrieval", "--from", model)
    assert place.tags(result["run"])["vlm_dist.test_videos_seen"] == tag
    assert said in warned if said else "warning" not in warned


def test_models_that_are_made_for_an_evaluation(place: Place, run: Any) -> None:
    """Two evaluations at once must not write one folder; nobody knows what a BERT has read."""
    import torch
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    BertModel(BertConfig(vocab_size=place.tokenizer.vocab_size, **sizes)).save_pretrained(place.folder / "bert")
    for source, seen in (("scratch", "0"), (str(place.folder / "bert"), "unknown")):
        result, _ = run("evaluate", "retrieval", "--from", source)
        assert result["form"] == "zero-shot"
        assert result["model"] == source
        tags = place.tags(result["run"])
        assert tags["vlm_dist.test_videos_seen"] == seen
        assert (tags["vlm_dist.source_model"] == "scratch") == (source == "scratch")
    assert [path.name for path in (place.folder / "runs").iterdir() if path.name.startswith(".")] == []


def test_a_fine_tuned_model_is_not_measured_zero_shot(place: Place, run: Any) -> None:
    model = place.model("tuned", features=place.other.meta.provenance)
    result, _ = run("evaluate", "retrieval", "--from", model, "--zero-shot")
    assert result["form"] == "zero-shot"
    save_head(Path(model), "retrieval", {})
    _, said = run("evaluate", "retrieval", "--from", model, "--zero-shot", code=2)
    assert "leave --from or --zero-shot out" in said
    assert run("evaluate", "retrieval", "--from", model)[0]["form"] == "fine-tuned"


def test_what_from_names_and_why_not(place: Place, run: Any) -> None:
    _, said = run("evaluate", "retrieval", "--from", "no-such-thing", code=1)
    assert "cannot get the model 'no-such-thing'" in said
    assert "Nor is 'no-such-thing' the name or id of a run" in said
    away = ("--set", "cluster.tracking_uri=http://127.0.0.1:9")
    _, said = run("evaluate", "retrieval", "--from", "some-run", *away, code=1)
    assert "the tracking server http://127.0.0.1:9 cannot be used" in said
    unfinished = place.folder / "runs" / "pretrain-0"
    unfinished.mkdir(parents=True)
    (unfinished / "run.json").write_text('{"status": "unfinished"}')
    _, said = run("evaluate", "retrieval", "--from", str(unfinished), code=1)
    assert "has no model (it is unfinished)" in said


def test_a_model_for_fine_tuning_is_made_in_the_runs_own_folder(place: Place, run: Any, ray_session: None) -> None:
    steps = ("--set", "finetune.max_steps=1", "--set", "finetune.select_on=last", "--set", "finetune.batch=4")
    result, _ = run("finetune", "retrieval", "--from", "scratch", "--gpus", "0", *steps)
    folder = Path(result["model"]).parent
    assert (folder / "init" / "config.json").is_file()
    assert [path.name for path in (place.folder / "runs").iterdir() if path.name.startswith(".")] == []
    tags = place.tags(result["run"])
    assert tags["vlm_dist.source_model"] == "scratch"
    assert tags["vlm_dist.test_videos_seen"] == "0"
    evaluated, said = run("evaluate", "retrieval", "--from", result["model"])
    assert place.tags(evaluated["run"])["vlm_dist.test_videos_seen"] == "0"
    assert place.tags(evaluated["run"])["vlm_dist.parent_run"] == result["run"]
    assert "warning" not in said
