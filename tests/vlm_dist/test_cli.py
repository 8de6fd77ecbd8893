"""The command line: its surface, its exit codes, its error lines, its speed."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer

from vlm_dist.cli import app as program
from vlm_dist.cli.app import COMMANDS, Entry, main
from vlm_dist.cli.context import Context
from vlm_dist.cli.output import counted, duration, progress
from vlm_dist.cli.packages import check_owners, check_packages
from vlm_dist.demo.run import next_commands
from vlm_dist.errors import ConfigError, StoreError, TaskDataError

COMMON = ["--set", "--workspace"]
# What scripts may rely on. Whoever changes a line here changes a promise.
SURFACE = {
    "init": ["folder"],
    "demo": ["--json", "--seed", "folder"],
    "doctor": [*COMMON, "--json"],
    "config show": [*COMMON, "--json"],
    "extract": [
        *COMMON, "--allow-pickle", "--captions", "--deterministic", "--json", "--layer", "--npy", "--random-weights",
        "--retry-failed", "--store", "--strict", "--tokenizer", "--weights", "--workers", "paths",
    ],
    "captions": [
        *COMMON, "--allow-pickle", "--deduplicate", "--json", "--store", "--tokenizer", "file",
    ],
    "store info": [*COMMON, "--json", "--plot", "store"],
    "store verify": [*COMMON, "--deep", "--json", "--repair", "--writers-gone", "store"],
    "store failures": [*COMMON, "--json", "store"],
    "store import": [
        *COMMON, "--allow-pickle", "--captions", "--extractor", "--ids", "--json", "--normalise", "--retry-failed",
        "--store", "--strict", "--tokenizer", "--weights", "sources",
    ],
    "store delete": [*COMMON, "--json", "--store", "--undo", "--videos", "ids"],
    "store split": [*COMMON, "--json", "--remove", "--store", "--videos", "ids", "name"],
    "store show": [*COMMON, "--json", "--store", "video"],
    "store prune": [*COMMON, "--dry-run", "--json", "--keep", "--voided", "store"],
    "store migrate": [*COMMON, "--json", "store"],
    "store export": ["--json", "--npy", "--parquet", "folder", "store"],
    "pretrain": [
        *COMMON, "--allow-store-change", "--dry-run", "--gpus", "--init", "--json", "--max-hours", "--max-steps",
        "--nodes", "--resume", "--store", "--workers",
    ],
    "checkpoint list": [*COMMON, "--json", "run"],
    "checkpoint verify": [*COMMON, "--json", "run"],
    "checkpoint export": [*COMMON, "--step", "out", "run"],
    "checkpoint prune": [*COMMON, "--keep", "run"],
    "finetune": [
        *COMMON, "--data", "--from", "--gpus", "--json", "--nodes", "--resume", "--store", "--workers", "task",
    ],
    "evaluate": [*COMMON, "--data", "--from", "--json", "--store", "--zero-shot", "task"],
    "jobs list": [*COMMON, "--json", "--limit"],
    "compare": [*COMMON, "--json", "runs"],
    "ui": COMMON,
}  # fmt: skip


def _surface() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}

    def walk(name: str, command: Any) -> None:
        if hasattr(command, "commands"):
            for part, inner in command.commands.items():
                walk(f"{name} {part}", inner)
        else:
            found[name] = sorted(p.name if p.param_type_name == "argument" else p.opts[0] for p in command.params)

    for name in COMMANDS:
        walk(name, program.load_command(name))
    return found


def test_the_surface_is_frozen() -> None:
    assert _surface() == {name: sorted(options) for name, options in SURFACE.items()}


def test_every_command_says_what_it_does_and_shows_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    for name in _surface():
        assert main([*name.split(), "--help"]) == 0
        text = capsys.readouterr().out
        assert "Examples:" in text, name
        assert f"vlm-dist {name}" in text, name


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    heavy = {"torch", "ray", "mlflow", "transformers", "deepspeed", "zarr", "numpy", "pydantic"}
    check = f"import sys, vlm_dist.cli.app; print(sorted({heavy!r} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True).stdout == "[]\n"
    best = min(_seconds([sys.executable, "-P", "-m", "vlm_dist", "--help"]) for _ in range(3))
    assert best < 0.5


def _seconds(command: list[str]) -> float:
    """Processor time of a command, which other work on the machine does not lengthen."""
    before = os.times()
    subprocess.run(command, capture_output=True, check=True)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def test_wrong_usage_is_one_line_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    for line in ("confg", "config show --jsn", "store verify a b", "jobs list --limit x", "jobs list --limit 0"):
        assert main(line.split()) == 2
        shown = capsys.readouterr()
        assert shown.err.startswith("error: ")
        assert shown.err.count("\n") == 1
        assert "--help` shows" in shown.err
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("vlm-dist ")
    assert main(["store"]) == 2
    assert "verify" in capsys.readouterr().err
    assert main([]) == 2
    assert "doctor" in capsys.readouterr().out


def test_init_writes_a_workspace_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["init", "ws"]) == 0
    text = (tmp_path / "ws" / "vlm-dist.toml").read_text()
    assert "# global_batch = 2048" in text
    assert main(["init", "ws"]) == 2
    assert "is there already" in capsys.readouterr().err
    assert (tmp_path / "ws" / "vlm-dist.toml").read_text() == text
    assert main(["config", "show", "--workspace", "ws", "--json", "--set", "train.seed=7"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["train.seed"] == {"value": 7, "origin": "--set"}
    assert shown["store"] == {"value": str(tmp_path / "ws" / "store"), "origin": "default"}
    assert main(["config", "show", "--workspace", "ws", "--set", "train.sed=7"]) == 2
    assert "train.seed" in capsys.readouterr().err


def _as_command(monkeypatch: pytest.MonkeyPatch, body: Any) -> None:
    """Make `vlm-dist trial` run `body`."""
    module = type(sys)("trial_command")
    module.run = body  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "trial_command", module)
    monkeypatch.setitem(COMMANDS, "trial", Entry("trial_command:run", "A trial.", "Trial"))
    monkeypatch.setattr(program, "app", typer.Typer(cls=program._Commands, add_completion=False))
    program.app.callback()(lambda: None)


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (ConfigError("no [such] key"), 2, "error: no [such] key"),
        (StoreError("shard 3 is damaged"), 1, "error: shard 3 is damaged"),
        (RuntimeError("odd"), 1, "error: unexpected RuntimeError: odd (run with --debug for the traceback)"),
        (
            TaskDataError("a.json:\n  line 1: odd\n  line 2: 1 s\nexpected: more"),
            1,
            "error: a.json: line 1: odd; line 2: 1 s; expected: more",
        ),
        (PermissionError(13, "Permission denied", "/x/y"), 1, "error: /x/y: Permission denied"),
        (
            KeyboardInterrupt(),
            130,
            "error: interrupted; what was finished is kept, and the same command goes on from there",
        ),
        (typer.Exit(3), 3, ""),
    ],
)
def test_errors_end_in_one_line_and_their_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: BaseException, code: int, text: str
) -> None:
    def fail() -> None:
        raise error

    _as_command(monkeypatch, fail)
    assert main(["trial"]) == code
    assert capsys.readouterr().err.strip() == text
    assert main(["trial", "--debug"]) == code
    debugged = capsys.readouterr().err
    assert ("Traceback" in debugged) == isinstance(error, Exception) * (not isinstance(error, typer.Exit))


def test_sigterm_ends_a_command_as_ctrl_c_does(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    left: list[str] = []

    def wait() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)
        finally:
            left.append("tidied")

    _as_command(monkeypatch, wait)
    assert main(["trial"]) == 130
    assert left == ["tidied"]
    assert "the same command goes on" in capsys.readouterr().err


def test_what_cannot_be_written_or_read_is_named_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "latin").mkdir()
    (tmp_path / "latin" / "vlm-dist.toml").write_bytes('store = "Café"'.encode("latin-1"))
    (tmp_path / "closed").mkdir()
    (tmp_path / "closed" / ".vlm-dist").touch()
    for line, said in (
        (["init", str(tmp_path / "file" / "x")], "Not a directory"),
        (["init", "/proc/x"], "no workspace can be made at /proc/x"),
        (["config", "show", "--workspace", str(tmp_path / "latin")], "no UTF-8 text"),
        (["jobs", "list", "--workspace", str(tmp_path / "closed")], "cannot be written"),
        (["evaluate", "youcook2", "--workspace", str(tmp_path)], "unknown task 'youcook2'"),
    ):
        assert main(line) == 2, line
        shown = capsys.readouterr().err
        assert said in shown
        assert "unexpected" not in shown
        assert shown.count("\n") == 1


CHATTY = """
import sys, types
from pathlib import Path
from vlm_dist.cli import app
def run():
    for word in ("a", "b"):
        print(word * 9000, flush=True)
        print(word, file=sys.stderr, flush=True)
    app.print_warning("seen by nobody")
    Path(sys.argv[1]).touch()
sys.modules["trial"] = types.SimpleNamespace(run=run)
app.COMMANDS["doctor"] = app.Entry("trial:run", "", "")
sys.exit(app.main(["doctor"]))
"""


def test_a_reader_that_leaves_does_not_end_the_work(tmp_path: Path) -> None:
    command = [sys.executable, "-c", CHATTY, str(tmp_path / "done")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as chatty:
        assert chatty.stdout is not None
        chatty.stdout.close()
    assert chatty.returncode == 0
    assert (tmp_path / "done").exists()


INTERRUPTED = """
import sys
from vlm_dist.__main__ import main
class Once:
    def find_spec(self, name, path, target=None):
        if name == "typer":
            sys.meta_path.remove(self)
            raise KeyboardInterrupt
sys.meta_path.insert(0, Once())
sys.exit(main())
"""


def test_ctrl_c_while_the_line_is_being_read(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(program._Commands, "parse_args", interrupted)
    assert main(["doctor"]) == 130
    assert capsys.readouterr().err.startswith("error: interrupted;")


def test_ctrl_c_while_the_program_is_being_loaded() -> None:
    done = subprocess.run([sys.executable, "-c", INTERRUPTED], capture_output=True, text=True, check=False)
    assert done.returncode == 130
    assert done.stderr.startswith("error: interrupted;")
    assert "Traceback" not in done.stderr


def test_store_commands_pass_on_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("info", "verify", "failures"):
        assert main(["store", command, str(tmp_path / "absent")]) == 1
        assert "absent" in capsys.readouterr().err


def test_doctor_finds_this_machine_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--workspace", str(tmp_path), "--json"]) == 0
    checks = {check["name"]: check for check in json.loads(capsys.readouterr().out)}
    assert {"Python", "torch", "ray", "deepspeed", "mlflow", "zarr", "video decoder", "C++ compiler", "GPUs"} <= set(
        checks
    )
    assert all(check["advice"] for check in checks.values() if check["state"] != "ok")
    absent = ["--set", "extract.weights=absent.pth", "--set", "cluster.tracking_uri=sqlite:///x.db"]
    assert main(["doctor", "--workspace", str(tmp_path), *absent]) == 1
    assert "extract.weights, cluster.tracking_uri" in capsys.readouterr().err


def test_packages_of_another_distribution_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_packages() == Path(program.__file__).resolve().parents[2]
    check_owners()
    (tmp_path / "cluster").mkdir()
    (tmp_path / "cluster" / "__init__.py").touch()
    command = (
        "import sys; sys.path.insert(0, sys.argv[1]); from vlm_dist.cli.app import main; sys.exit(main(['--version']))"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(program.__file__).resolve().parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", command, str(tmp_path)], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 2
    assert "another distribution owns the package `cluster`" in done.stderr
    metadata = tmp_path / "cluster-1.4.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: cluster\nVersion: 1.4\n")
    (metadata / "top_level.txt").write_text("cluster\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match="owns the package `cluster`: cluster"):
        check_owners()


def test_progress_is_plain_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("extract", total=80, unit="videos") as bar:
        bar.update(1, "1.5 videos/s")
        bar.update(20, "2.0 videos/s")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("extract: 1/80 videos (1 %) after 0 s, ")
    assert lines[-1].startswith("extract: 20/80 videos (25 %)")
    assert lines[-1].endswith("2.0 videos/s")
    assert len(lines) == 2


def test_numbers_agree_with_their_nouns() -> None:
    assert [counted(number, "video") for number in (0, 1, 2)] == ["0 videos", "1 video", "2 videos"]


def test_ray_is_announced_where_it_must_be_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("cluster.ray_local.ray_session", lambda cluster: nullcontext([]))
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(is_initialized=lambda: True))
    with Context.open(tmp_path, None).ray():
        assert capsys.readouterr().err == ""
    monkeypatch.delitem(sys.modules, "ray")
    with Context.open(tmp_path, None).ray():
        assert capsys.readouterr().err == "Starting Ray …\n"
    with Context.open(tmp_path, ["cluster.ray_address=here:6379"]).ray():
        assert capsys.readouterr().err == "Connecting to Ray at here:6379 …\n"


def test_a_suggested_command_can_be_typed_as_it_stands(tmp_path: Path) -> None:
    store = str(tmp_path / "my store")
    with pytest.raises(ConfigError) as caught:
        Context.open(tmp_path, None, {"store": store}).require_store()
    assert shlex.split(str(caught.value).split("`")[1])[-2:] == ["--store", store]
    folder = tmp_path / "a demo"
    assert [shlex.split(line)[-1] for line in next_commands(folder)] == [*[str(folder)] * 3, str(folder / "store")]


def test_durations_read_well() -> None:
    assert [duration(s) for s in (0, 59.6, 3599, 7260, 180_000)] == [
        "0 s",
        "1 min 00 s",
        "59 min 59 s",
        "2 h 01 min",
        "2 d 02 h",
    ]
