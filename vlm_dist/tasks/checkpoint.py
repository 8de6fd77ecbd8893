"""A fine-tuned folder -> the module that predicts: the encoder of `vlm_dist.load` and the head of one task."""

import json
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from vlm_dist.errors import CheckpointError
from vlm_dist.model.vlm import VLM
from vlm_dist.tasks.base import Task, TaskModel

HEAD = "head.safetensors"
TASK = "task.json"


def save_head(folder: Path, task: str, head: dict[str, Tensor]) -> None:
    """Write what a task put on the encoder (possibly nothing), and which task it was."""
    save_file({name: tensor.contiguous() for name, tensor in head.items()}, folder / HEAD)
    (folder / TASK).write_text(json.dumps({"task": task}, indent=1))


def fine_tuned_task(folder: Path) -> str | None:
    """Name of the task that a model folder was fine-tuned on; None for a pre-trained one."""
    path = folder / TASK
    return json.loads(path.read_text())["task"] if path.is_file() else None


def build_for_evaluation(task: Task, vlm: VLM, folder: Path) -> TaskModel:
    """The fine-tuned module of `folder`, or the zero-shot one where the folder holds a pre-trained model.

    Errors: CheckpointError when it was fine-tuned on another task or its head has other shapes; ConfigError when the
    task has no zero-shot form.
    """
    trained_on = fine_tuned_task(folder)
    if trained_on is None:
        return task.build_zero_shot(vlm)
    if trained_on != task.name:
        raise CheckpointError(f"{folder} was fine-tuned on {trained_on}, not on {task.name}: name a run of {task.name}")
    model = task.build(vlm)
    head = load_file(folder / HEAD)
    own = {name: t for name, t in model.state_dict().items() if not name.startswith("vlm.")}
    for name in sorted(own.keys() | head.keys()):
        if name not in own or name not in head or own[name].shape != head[name].shape:
            found = tuple(head[name].shape) if name in head else "missing"
            wanted = tuple(own[name].shape) if name in own else "none"
            raise CheckpointError(
                f"{folder / HEAD}: {name} is {found}, these annotations need {wanted}; evaluate on the data it was "
                "fine-tuned for"
            )
    model.load_state_dict(head, strict=False)
    return model
