"""Names that a user types → tasks (the only place that lists them)."""

from difflib import get_close_matches

from vlm_dist.errors import ConfigError
from vlm_dist.tasks.base import Task
from vlm_dist.tasks.config import TaskDataConfig
from vlm_dist.tasks.retrieval import RetrievalTask
from vlm_dist.tasks.segmentation import CoinTask, SegmentationTask

TASKS: dict[str, type[Task]] = {task.name: task for task in (RetrievalTask, CoinTask, SegmentationTask)}


def make_task(name: str, options: TaskDataConfig | None = None) -> Task:
    """A task by name, not loaded yet.

    Raises:
        ConfigError: No such task; names the nearest and all there are.
    """
    if name not in TASKS:
        near = get_close_matches(name, TASKS, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"unknown task {name!r}{hint} (tasks: {', '.join(sorted(TASKS))})")
    return TASKS[name](options)
