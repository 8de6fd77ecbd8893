"""Our results in the paper's tables."""

import json
import statistics

import pytest

from jobs.compare import compare
from jobs.paper import PAPER, VLM
from jobs.runs import list_runs
from jobs.tracking import tracked_run
from vlm_dist.cli.app import main


def _run(uri: str, task: str, kind: str, params: dict[str, object], metrics: dict[str, float], **tags: str) -> str:
    texts = {key: str(value) for key, value in params.items()}
    with tracked_run(
        uri, kind=kind, task=task, params=texts, tags={f"vlm_dist.{k}": v for k, v in tags.items()}
    ) as run:
        run.metrics(metrics, 0)
    return run.name


@pytest.fixture(scope="module")
def seeds(uri: str) -> list[str]:
    """Ids of an old run, three seeds of a newer configuration, and a zero-shot evaluation."""
    coin = "coin/frame_accuracy"
    _run(uri, "coin", "finetune", {"train.seed": 0, "finetune.lr": 9}, {coin: 0.99})
    names = [
        _run(
            uri, "coin", "finetune", {"train.seed": seed, "finetune.lr": 1, "runs": f"/r{seed}"},
            {coin: value, "coin/constant_frame_accuracy": 0.125, "unshown": 1.0},
        )
        for seed, value in enumerate((0.60, 0.70, 0.65))
    ]  # fmt: skip
    _run(uri, "msrvtt", "evaluate", {"train.seed": 0}, {"msrvtt/recall_at_1": 0.05}, form="zero-shot")
    return names


def test_the_newest_configuration_of_each_task_with_all_its_seeds(uri: str, seeds: list[str]) -> None:
    tables = {table.task: table for table in compare(uri)}
    coin = tables["coin"]
    assert coin.metrics == ("frame_accuracy",)
    ours = [row for row in coin.rows if row.source == "ours"]
    assert len(ours) == 1
    assert (ours[0].label, ours[0].n, set(ours[0].runs)) == ("ours: finetune", 3, set(seeds))
    value = ours[0].values["frame_accuracy"]
    assert value.mean == pytest.approx(0.65)
    assert value.spread == pytest.approx(statistics.stdev((0.60, 0.70, 0.65)))
    paper = {row.label: row.values for row in coin.rows if row.source == "paper"}
    assert paper[VLM]["frame_accuracy"].mean == pytest.approx(0.6839)
    assert len(paper) == 7
    (baseline,) = [row for row in coin.rows if row.source == "baseline"]
    assert (baseline.label, baseline.values["frame_accuracy"].mean) == ("constant answer", 0.125)
    zero_shot = tables["msrvtt"].rows[-1]
    assert (zero_shot.label, zero_shot.n) == ("ours: evaluate zero-shot", 1)
    assert set(zero_shot.values) == {"recall_at_1"}
    assert zero_shot.values["recall_at_1"].spread is None


def test_named_runs_that_differ_say_in_what(uri: str) -> None:
    names = [
        _run(uri, "youcook2", "finetune", {"masks.mmm_probability": share}, {"youcook2/recall_at_1": share / 10})
        for share in (0.0, 0.5)
    ]
    # two runs of one second share a name; ids tell them apart
    ids = [row.id for row in list_runs(uri, 2)]
    (table,) = compare(uri, ids)
    labels = [row.label for row in table.rows if row.source == "ours"]
    assert labels == ["ours: finetune, masks.mmm_probability=0.5", "ours: finetune, masks.mmm_probability=0.0"]
    assert len(names) == 2


def test_what_was_measured_again_is_not_another_seed(uri: str) -> None:
    for seed, model, value in ((0, "a", 0.1), (0, "a", 0.3), (1, "b", 0.5), (1, "b", 0.5)):
        params: dict[str, object] = {"train.seed": seed}
        _run(uri, "again", "evaluate", params, {"again/recall_at_1": value}, parent_run=model)
    ids = [row.id for row in list_runs(uri, 4)]
    for names in (ids, ids[::-1], []):
        (row,) = next(table for table in compare(uri, names) if table.task == "again").rows
        assert (row.n, row.values["recall_at_1"].mean) == (2, pytest.approx(0.4))


def test_results_of_differently_trained_models_are_not_mixed(uri: str) -> None:
    for seed in (0, 1):
        for share in (0.0, 0.5):
            pretrained = {"train.seed": seed, "masks.mmm_probability": share}
            _run(uri, "", "pretrain", pretrained, {"train/loss": 1.0})
            origin = list_runs(uri, 1)[0].id
            tags = {"parent_run": origin, "source_model": f"digest of {origin}"}
            _run(uri, "retrieval", "evaluate", {}, {"retrieval/recall_at_5": share + seed / 10}, **tags)
    (newest,) = [table for table in compare(uri) if table.task == "retrieval"]
    assert [(row.n, row.values["recall_at_5"].mean) for row in newest.rows] == [(2, pytest.approx(0.55))]
    ids = [row.id for row in list_runs(uri, 8) if row.kind == "evaluate"]
    (table,) = compare(uri, ids)
    assert {row.label: (row.n, round(row.values["recall_at_5"].mean, 6)) for row in table.rows} == {
        "ours: evaluate, pretrain masks.mmm_probability=0.5": (2, 0.55),
        "ours: evaluate, pretrain masks.mmm_probability=0.0": (2, 0.05),
    }


@pytest.mark.parametrize(
    ("task", "what", "values"),
    [
        ("a", "tag source_model", ("scratch", "bert-base-uncased")),
        ("b", "tag store_fingerprint", ("0a" * 32, "0b" * 32)),
        ("c", "tag data_digest", ("1a" * 32, "1b" * 32)),
        ("d", "store_layout.check", ("always", "off")),
        ("e", "train.seeds_of_another_kind", (1, 2)),
    ],
)
def test_runs_that_differ_in_more_than_the_seed_are_not_averaged(
    uri: str, task: str, what: str, values: tuple[object, object]
) -> None:
    for value in values:
        for seed in (0, 1):
            params: dict[str, object] = {"train.seed": seed, "store": f"/w{seed}", f"data.{task}.data": f"/d{seed}"}
            tags = {what.removeprefix("tag "): str(value)} if what.startswith("tag ") else {}
            params |= {} if tags else {what: value}
            _run(uri, task, "finetune", params, {f"{task}/recall_at_1": 0.5}, **tags)
    (table,) = compare(uri, [row.id for row in list_runs(uri, 4)])
    assert [row.n for row in table.rows] == [2, 2]
    name = what.removeprefix("tag ")
    shown = [str(value)[:8] if len(str(value)) > 40 else str(value) for value in values]
    assert {row.label for row in table.rows} == {f"ours: finetune, {name}={value}" for value in shown}


def test_the_command_prints_the_papers_table_with_ours(
    uri: str, seeds: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    server = ["--set", f"cluster.tracking_uri={uri}"]
    assert main(["compare", *server]) == 0
    text = capsys.readouterr().out
    assert "Table 4: action segmentation on COIN" in text
    assert "68.39" in text
    assert "65.00 ± 5.00" in text
    assert main(["compare", "--json", *server]) == 0
    tables = {table["task"]: table for table in json.loads(capsys.readouterr().out)}
    assert tables["coin"]["rows"][-1]["values"]["frame_accuracy"]["mean"] == pytest.approx(0.65)
    assert main(["compare", "no-such-run", *server]) == 1
    assert len(seeds) == 3


def test_the_papers_tables_are_whole() -> None:
    assert {task: len(table.rows) for task, table in PAPER.items()} == {
        "msrvtt": 7, "youcook2": 6, "coin": 7, "crosstask": 9, "msrvtt-qa": 3, "youcook2-caption": 7,
    }  # fmt: skip
    assert all(VLM in table.rows for table in PAPER.values())
    assert PAPER["youcook2-caption"].rows[VLM] == {
        "bleu3": 0.1778, "bleu4": 0.1227, "meteor": 0.1822, "rouge_l": 0.4151, "cider": 1.3869,
    }  # fmt: skip
    shares = [
        v
        for t in PAPER.values()
        for row in t.rows.values()
        for k, v in row.items()
        if k not in ("median_rank", "cider")
    ]
    assert all(0 < share < 1 for share in shares)
