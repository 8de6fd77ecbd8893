import pytest

from vlm_dist.errors import ConfigError
from vlm_dist.tasks.registry import TASKS, make_task


def test_unknown_task_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"unknown task 'cion'; did you mean coin\? \(tasks: coin, retrieval"):
        make_task("cion")


@pytest.mark.parametrize("name", sorted(TASKS))
def test_every_task_is_whole(name: str) -> None:
    task = make_task(name)
    assert task.name == name
    assert task.selection.metric.startswith(f"{name}/")
    assert min(task.recipe) > 0
