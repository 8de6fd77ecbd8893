"""What every command of the data's way begins with: settings, a tracked run, training events shown and logged."""

import shlex
import sys
from collections.abc import Generator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_dist.cli.output import Progress, print_status, print_warning, progress
from vlm_dist.config import Resolved, Settings, load_settings
from vlm_dist.errors import ConfigError

if TYPE_CHECKING:
    from cluster.resources import NodeResources
    from jobs.tracking import Tracker
    from vlm_dist.train.goodput import Goodput


@dataclass(frozen=True)
class Context:
    """A workspace and its resolved settings."""

    resolved: Resolved

    @classmethod
    def open(cls, workspace: Path, overrides: list[str] | None, flags: Mapping[str, Any] | None = None) -> "Context":
        """Resolve the settings of a command line."""
        return cls(load_settings(workspace, overrides, flags))

    @property
    def settings(self) -> Settings:
        """The resolved settings."""
        return self.resolved.settings

    @property
    def store(self) -> str:
        """The workspace's feature store."""
        return self.settings.store

    @property
    def runs(self) -> Path:
        """Folder of training runs."""
        return Path(self.settings.runs)

    def require_store(self, store: str = "") -> str:
        """The store, if it is there. Errors: ConfigError that says how to make one."""
        store = store or self.store
        if not store.startswith("s3://") and not Path(store).exists():
            command = f"vlm-dist extract VIDEOS --store {shlex.quote(store)}"
            raise ConfigError(f"there is no feature store at {store}; make one with `{command}`")
        return store

    @contextmanager
    def ray(self) -> Generator[list["NodeResources"]]:
        """Ray for the block, as `ray_session`; says so where it must be started first, which takes seconds."""
        from cluster.ray_local import ray_session

        known = sys.modules.get("ray")  # importing it is for `ray_session`, which prepares that
        if known is None or not known.is_initialized():
            address = self.settings.cluster.ray_address
            print_status(f"Connecting to Ray at {address} …" if address else "Starting Ray …")
        with ray_session(self.settings.cluster) as nodes:
            yield nodes

    @contextmanager
    def tracked(self, kind: str, **options: Any) -> Generator["Tracker"]:
        """A run in MLflow, on the workspace's own server or the configured one, for the block."""
        from cluster.mlflow_server import tracking_server
        from jobs.tracking import tracked_run

        with (
            tracking_server(self.settings.cluster, self.resolved.folder) as uri,
            tracked_run(uri, kind=kind, params=self.settings.flat(), **options) as tracker,
        ):
            tracker.text(self.resolved_json(), "config.resolved.json")
            yield tracker

    def resolved_json(self) -> str:
        """The settings as JSON text."""
        return self.settings.model_dump_json(indent=1)


def store_address(store: Path | None, workspace: Path, overrides: list[str] | None) -> str:
    """The store that a command line names, else the workspace's."""
    return load_settings(workspace, overrides, {"store": store}).settings.store


class TrainingView:
    """Events of a training run -> one progress line, the run's metrics, and a few lines worth keeping."""

    def __init__(self, title: str, tracker: "Tracker", places: int = 0) -> None:
        from vlm_dist.train.goodput import GoodputLedger

        self._ledger = GoodputLedger(places)
        self.title = title
        self.tracker = tracker
        self._stack = ExitStack()
        self._bar: Progress | None = None

    def __enter__(self) -> "TrainingView":
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()
        if (total := self.goodput) and error[0] is None:
            numbers = {"goodput": total.share, "restarts": total.restarts, "updates_made_again": total.made_again}
            self.tracker.metrics({f"train/{name}": float(value) for name, value in numbers.items()}, total.updates)

    @property
    def goodput(self) -> "Goodput | None":
        """Where the time went so far."""
        return self._ledger.total()

    def __call__(self, kind: str, payload: Any) -> None:
        """Take one event of `vlm_dist.train.ray_trainer.run_training`."""
        self._ledger.take(kind, payload)
        if kind == "plan":
            self.tracker.tags({f"vlm_dist.{name}": value for name, value in payload.items()})
            self._bar = self._bar or self._stack.enter_context(progress(self.title, payload["steps"], "steps"))
        elif kind == "step":
            self.tracker.metrics(payload.values, payload.step)
            if self._bar:
                self._bar.update(payload.step, self._note(payload))
        elif kind == "validation":
            values = {key: value for key, value in payload.items() if key != "step"}
            self.tracker.metrics(values, int(payload["step"]))
        elif kind == "checkpoint":
            self.tracker.tags({"vlm_dist.training_checkpoint": payload})
        elif kind == "resumed":
            print_warning(f"going on from step {payload['step']} ({payload['path']})")
        elif kind == "warning":
            print_warning(payload)

    @staticmethod
    def _note(report: Any) -> str:
        values = report.values
        parts = [f"loss {values['train/loss']:.3f}"]
        if "train/text_accuracy" in values:
            parts.append(
                f"words {values['train/text_accuracy']:.0%}, frames {values['train/video_accuracy']:.0%} right"
            )
        if "train/clips_per_s" in values:
            parts.append(f"{values['train/clips_per_s']:.0f} clips/s")
        parts.append(f"lr {values['train/lr']:.1e}")
        return ", ".join(parts)
