"""Settings as text: the commented vlm-dist.toml of `init`."""

import json
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel

from vlm_dist.config import FILE, Settings

_INTRODUCTION = f"""\
# {FILE}: the settings of this workspace. Every line below shows a default; take the `# ` away to change it.
# A flag goes before `--set a.b=c`, that before the environment (VLM_DIST_TRAIN__SEED=1), that before this file.
# Relative paths start at the folder of this file. `vlm-dist config show` prints every value and where it comes from.
"""
_EXAMPLE = """
# Annotations and features of each end task; one section per task.
# [data.coin]
# data = "COIN.json"
# store = \"\""""


def template() -> str:
    """A vlm-dist.toml with every setting, its meaning and its default, all commented out."""
    return _INTRODUCTION + "\n".join(_section(Settings(), "")) + "\n"


def _section(model: BaseModel, prefix: str) -> Iterator[str]:
    tables: list[tuple[str, BaseModel]] = []
    for name, field in type(model).model_fields.items():
        value = getattr(model, name)
        if isinstance(value, BaseModel):
            tables.append((f"{prefix}{name}", value))
        elif isinstance(value, dict):
            yield _EXAMPLE
        else:
            choices = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
            one_of = f" One of: {', '.join(map(str, choices))}." if choices else ""
            yield f"# {field.description}{one_of}"
            yield f"# {name} = {_literal(value)}" if value is not None else f"# {name} ="
    for name, table in tables:
        about = (type(table).__doc__ or "").partition("\n")[0]
        yield f"\n# {about}\n[{name}]"
        yield from _section(table, f"{name}.")


def _literal(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_literal(part) for part in value) + "]"
    return repr(value)
