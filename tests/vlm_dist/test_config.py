"""Settings: precedence, origins, refusals, paths, and the file that `init` writes."""

import re
import shutil
import tomllib
from pathlib import Path

import pytest

from vlm_dist.config import FILE, Settings, fields, load_settings, pattern
from vlm_dist.config_file import template
from vlm_dist.errors import ConfigError


def _workspace(folder: Path, text: str = "") -> Path:
    (folder / FILE).write_text(text)
    return folder


def test_each_source_goes_before_the_next(tmp_path: Path) -> None:
    _workspace(tmp_path, "[train]\nseed = 1\nepochs = 2.0\nmicro_batch = 3\nlog_every = 4\n")
    env = {
        "VLM_DIST_TRAIN__EPOCHS": "20",
        "VLM_DIST_TRAIN__MICRO_BATCH": "30",
        "VLM_DIST_TRAIN__LOG_EVERY": "40",
        "X": "1",
    }
    overrides = ["train.micro_batch=300", "train.log_every=400"]
    resolved = load_settings(tmp_path, overrides, {"train.log_every": 4000, "train.max_steps": None}, env)
    train = resolved.settings.train
    assert (train.seed, train.epochs, train.micro_batch, train.log_every) == (1, 20.0, 300, 4000)
    assert {
        key: resolved.origins[f"train.{key}"] for key in ("seed", "epochs", "micro_batch", "log_every", "max_steps")
    } == {
        "seed": "vlm-dist.toml:2",
        "epochs": "environment VLM_DIST_TRAIN__EPOCHS",
        "micro_batch": "--set",
        "log_every": "command line",
        "max_steps": "default",
    }


def test_a_folder_without_file_has_the_defaults(tmp_path: Path) -> None:
    resolved = load_settings(tmp_path, env={})
    assert set(resolved.origins.values()) == {"default"}
    assert resolved.settings.store == str(tmp_path / "store")
    assert resolved.settings.init == "bert-base-uncased"


def test_texts_of_a_shell_become_typed_values(tmp_path: Path) -> None:
    overrides = ["train.optim.lr=1e-4", "train.constant_column=yes", "train.zero_stage=2", "train.optim.betas=0.8,0.9"]
    resolved = load_settings(tmp_path, [*overrides, "finetune.batch=none", 'data.msrvtt-qa.data=a"b'], env={})
    train = resolved.settings.train
    assert (train.optim.lr, train.constant_column, train.zero_stage, train.optim.betas) == (1e-4, True, 2, (0.8, 0.9))
    assert resolved.settings.finetune.batch is None
    assert resolved.settings.data["msrvtt-qa"].data.endswith('a"b')


def test_a_list_may_be_quoted_as_in_the_file(tmp_path: Path) -> None:
    written = f"""["{tmp_path}/a.lst", '{tmp_path}/b.lst', {tmp_path}/c's.lst]"""
    paths = tuple(f"{tmp_path}/{name}.lst" for name in ("a", "b", "c's"))
    assert load_settings(tmp_path, [f"split.exclude={written}"], env={}).settings.split.exclude == paths
    env = {"VLM_DIST_SPLIT__EXCLUDE": written}
    assert load_settings(tmp_path, env=env).settings.split.exclude == paths


def test_environment_reaches_a_task_with_a_dash(tmp_path: Path) -> None:
    resolved = load_settings(tmp_path, env={"VLM_DIST_DATA__MSRVTT_QA__STORE": str(tmp_path)})
    assert resolved.settings.data["msrvtt-qa"].store == str(tmp_path)


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("train.sed=3", ["`train.sed`", "--set", "did you mean `train.seed`?"]),
        ("lr=3", ["`train.optim.lr`", "`finetune.lr`"]),
        ("train=3", ["section", "[train]"]),
        ("data.coin.dat=x", ["did you mean"]),
        ("qqqq=1", ["config show"]),
        ("train.seed=abc", ["train.seed = 'abc'", "--set", "integer", "Seed of order"]),
        ("train.epochs=-1", ["train.epochs", "greater than 0"]),
        ("train.zero_stage=0", ["stage 0 makes wrong updates in fp16 and bf16", "take 1 or 2"]),
        ("train.zero_stage=3", ["stage 3 cuts up weights that every GPU has room for"]),
        ("train.loss=nce", ["'joint' or 'mfm-mlm'"]),
        ("clips.min_text_tokens=99", ["[clips]", "min_text_tokens 99", "--set"]),
        ("train.seed", ["KEY=VALUE"]),
    ],
)
def test_refusals_say_what_where_and_what_to_do(tmp_path: Path, override: str, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as refusal:
        load_settings(tmp_path, [override], env={})
    for part in parts:
        assert part in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_refusals_of_the_file_name_its_line(tmp_path: Path) -> None:
    _workspace(tmp_path, "store = 'x'\n\n[train.optim]\nlearning_rate = 1.0\n")
    with pytest.raises(ConfigError, match=r"`train\.optim\.learning_rate` \(vlm-dist\.toml:4\)"):
        load_settings(tmp_path, env={})
    _workspace(tmp_path, "[trian]\n")
    with pytest.raises(ConfigError, match=r"`trian` \(vlm-dist\.toml:1\)"):
        load_settings(tmp_path, env={})
    _workspace(tmp_path, "store = \n")
    with pytest.raises(ConfigError, match="not valid TOML"):
        load_settings(tmp_path, env={})
    with pytest.raises(ConfigError, match="not a folder"):
        load_settings(tmp_path / "absent", env={})


def test_unknown_environment_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"environment VLM_DIST_TRAIN__SED.*train\.seed"):
        load_settings(tmp_path, env={"VLM_DIST_TRAIN__SED": "1"})


def test_relative_paths_start_where_they_were_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = tmp_path / "elsewhere"
    workspace = tmp_path / "workspace"
    elsewhere.mkdir()
    workspace.mkdir()
    (workspace / "bert").mkdir()
    _workspace(
        workspace,
        "store = 'a'\ninit = 'bert'\n[split]\nexclude = ['x.txt', 'y.txt']\n[data.coin]\ndata = '../COIN.json'\n"
        "[captions]\ntokenizer = 'wordpiece:100'\n",
    )
    monkeypatch.chdir(elsewhere)
    settings = load_settings(workspace, ["captions_file=c.json"], {"runs": Path("r")}, {}).settings
    assert settings.store == str(workspace / "a")
    assert settings.init == str(workspace / "bert")
    assert settings.split.exclude == (str(workspace / "x.txt"), str(workspace / "y.txt"))
    assert settings.data["coin"].data == str(tmp_path / "COIN.json")
    assert settings.captions.tokenizer == "wordpiece:100"
    assert settings.captions_file == str(elsewhere / "c.json")
    assert settings.runs == str(elsewhere / "r")
    assert load_settings(workspace, ["store=s3://bucket/store"], env={}).settings.store == "s3://bucket/store"
    for mistyped in ("S3://bucket/store", "s3:/bucket/store", "S3:/bucket/store"):
        assert load_settings(workspace, [f"store={mistyped}"], env={}).settings.store == "s3://bucket/store"
    assert load_settings(workspace, ["store=s3:"], env={}).settings.store == "s3://"
    for address in ("s3://bucket/store", "gs://bucket/store"):  # one slash of the two is left in a Path
        assert load_settings(workspace, (), {"store": Path(address)}, {}).settings.store == address


def test_the_template_shows_every_setting_and_means_the_defaults(tmp_path: Path) -> None:
    text = template()
    assert tomllib.loads(text).keys() == {key.partition(".")[0] for key in fields() if "." in key} - {"data"}
    uncommented = re.sub(r"^# (\w+ = |\[data)", r"\1", text, flags=re.MULTILINE)
    table = tomllib.loads(uncommented)
    assert table["data"].pop("coin")["data"] == "COIN.json"
    assert Settings.model_validate(table) == Settings()
    names = {key.rpartition(".")[2] for key in fields() if "*" not in key}
    assert all(re.search(rf"^# {name} =", text, re.MULTILINE) for name in names)


def test_flat_settings_are_scalars_under_dotted_keys(tmp_path: Path) -> None:
    flat = load_settings(tmp_path, ["data.coin.data=/x"], env={}).settings.flat()
    assert flat["train.optim.betas"] == "0.9, 0.98"
    assert flat["data.coin.data"] == "/x"
    assert flat["finetune.batch"] == "none"
    assert all(isinstance(value, (str, int, float, bool)) for value in flat.values())


def test_every_setting_has_a_description() -> None:
    assert [key for key, field in fields().items() if not (field.description or "").endswith(".")] == []


def test_pattern_knows_tasks_of_any_name() -> None:
    assert pattern("data.my-task.data") == "data.*.data"
    assert pattern("data.*.data") == "data.*.data"
    assert pattern("data.coin") is None


def test_the_papers_values_are_settings(tmp_path: Path) -> None:
    """examples/paper.toml as a file of settings: what is marked there differs from the defaults, nothing else."""
    example = Path(__file__).resolve().parents[2] / "examples" / "paper.toml"
    shutil.copy(example, tmp_path / "vlm-dist.toml")
    ours, plain = load_settings(tmp_path, env={}), Settings()
    assert sum(origin != "default" for origin in ours.origins.values()) > 20
    marked = set(re.findall(r"^(\w+) = .*\[differs\]$", example.read_text(), re.MULTILINE))
    before = dict(plain.items())
    changed = {
        key.rpartition(".")[2]
        for key, value in ours.settings.items()
        if before[key] not in (value, None, "auto") and key not in ("store", "runs")
    }
    assert changed == marked == {"head", "whole_text", "global_batch"}
