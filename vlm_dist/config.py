"""All settings in one place: the component models composed, merged from five sources, and each value's origin kept.

Precedence: command-line flag > `--set a.b=c` > `VLM_DIST_A__B` > `vlm-dist.toml` > default.
"""

import difflib
import os
import re
import tomllib
import types
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, Union, cast, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo

from cluster.config import ClusterConfig
from feature_store.config import ADDRESS, CaptionConfig, ExtractConfig, StoreConfig
from vlm_dist.data.config import ClipConfig, MaskConfig, SplitConfig
from vlm_dist.errors import ConfigError
from vlm_dist.model.config import ModelConfig
from vlm_dist.tasks.config import TaskDataConfig
from vlm_dist.train.config import FinetuneConfig, TrainConfig

FILE = "vlm-dist.toml"
ENV_PREFIX = "VLM_DIST_"
# A path is resolved against the folder of what it was written in; a name may also be a path, when it is there.
_PATHS = {"store", "runs", "captions_file", "extract.weights", "split.exclude", "data.*.data", "data.*.store"}
_NAMES_OR_PATHS = {"init", "captions.tokenizer"}


class Settings(BaseModel):
    """Everything that a command may need to know; one section per component."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    store: str = Field(default="store", description="Feature store: the folder with features and caption tokens.")
    runs: str = Field(default="runs", description="Folder for checkpoints; every run has its own folder in it.")
    captions_file: str = Field(
        default="", description="Caption file that extract reads (raw_caption.json, JSONL, CSV or pickle)."
    )
    init: str = Field(
        default="bert-base-uncased",
        description="Where pre-training starts: Hugging Face BERT name, folder, reference checkpoint, or scratch.",
    )
    extract: ExtractConfig = ExtractConfig()
    store_layout: StoreConfig = StoreConfig()
    captions: CaptionConfig = CaptionConfig()
    clips: ClipConfig = ClipConfig()
    masks: MaskConfig = MaskConfig()
    split: SplitConfig = SplitConfig()
    model: ModelConfig = ModelConfig()
    train: TrainConfig = TrainConfig()
    finetune: FinetuneConfig = FinetuneConfig()
    data: dict[str, TaskDataConfig] = Field(default={}, description="Annotations and features of each end task.")
    cluster: ClusterConfig = ClusterConfig()

    def items(self) -> Iterator[tuple[str, Any]]:
        """Yield (dotted key, value) of every setting, in the order of the file."""
        yield from flatten(self.model_dump())

    def flat(self) -> dict[str, str | int | float | bool]:
        """Dotted scalars, as MLflow params want them: lists joined by commas, None as `none`."""
        return {key: _scalar(value) for key, value in self.items() if value != {}}


@dataclass(frozen=True)
class Resolved:
    """Settings together with the origin of every value and the workspace that they belong to."""

    settings: Settings
    origins: dict[str, str]
    folder: Path


def load_settings(
    folder: Path,
    overrides: Iterable[str] | None = None,
    flags: Mapping[str, Any] | None = None,
    env: Mapping[str, str] | None = None,
) -> Resolved:
    """Merge all sources of settings for the workspace `folder` (with or without a vlm-dist.toml).

    Args:
        folder: The workspace; relative paths in its file and in the defaults start here.
        overrides: `a.b=c` texts of `--set`; relative paths in them, in flags and in `env` start at the current folder.
        flags: Dotted key to value; None means that the flag was not given.
        env: Environment; None takes the process's own.

    Raises:
        ConfigError: An unknown key (with the nearest known name), a value of the wrong type, a file that is no TOML.
    """
    folder = Path(folder).expanduser().absolute()
    if not folder.is_dir():
        raise ConfigError(f"workspace {folder} is not a folder; make it with `vlm-dist init {folder}`")
    sources = [
        *((item, folder) for item in _from_file(folder / FILE)),
        *((item, Path.cwd()) for item in _from_env(os.environ if env is None else env)),
        *((item, Path.cwd()) for item in _from_overrides(overrides or ())),
        *(((k, v, "command line"), Path.cwd()) for k, v in (flags or {}).items() if v is not None),
    ]
    values = {key: _resolve(key, field.default, folder) for key, field in fields().items() if key in _PATHS}
    origins: dict[str, str] = {}
    for (key, value, origin), base in sources:
        if pattern(key) is None:
            if value == {} and _is_section(key):
                continue
            raise ConfigError(f"unknown setting `{key}` ({origin}){_nearest(key)}")
        values[key] = _resolve(key, str(value) if isinstance(value, Path) else value, base)
        origins[key] = origin
    try:
        settings = Settings.model_validate(_nest(values))
    except ValidationError as error:
        raise ConfigError(_explain(error, values, origins)) from None
    return Resolved(settings, {key: origins.get(key, "default") for key, _ in settings.items()}, folder)


@cache
def fields() -> dict[str, FieldInfo]:
    """Every known dotted key with its field; `*` stands for the task's name in `data`."""
    return dict(_walk(Settings))


def pattern(key: str) -> str | None:
    """The entry of `fields()` that `key` belongs to, or None for an unknown key."""
    head, _, tail = key.partition(".")
    wild = f"{head}.*.{tail.partition('.')[2]}"
    return key if key in fields() and "*" not in key else wild if wild in fields() else None


def flatten(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, leaf) of nested tables; an empty table is a leaf."""
    for name, value in table.items():
        if isinstance(value, dict) and value:
            yield from flatten(cast("dict[str, Any]", value), f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _walk(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    for name, field in model.model_fields.items():
        kind = field.annotation
        if get_origin(kind) is dict:
            yield from _walk(get_args(kind)[1], f"{prefix}{name}.*.")
        elif isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from _walk(kind, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field


def _from_file(path: Path) -> Iterator[tuple[str, Any, str]]:
    if not path.is_file():
        return
    try:
        text = path.read_text(encoding="utf-8")
        table = tomllib.loads(text)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is no UTF-8 text, as TOML must be ({error}); save it as UTF-8") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from None
    lines = _lines_of_keys(text)
    for key, value in flatten(table):
        yield key, value, f"{FILE}:{lines[key]}" if key in lines else FILE


def _lines_of_keys(text: str) -> dict[str, int]:
    """Line number of each plainly written key, for messages only."""
    lines: dict[str, int] = {}
    section = ""
    for number, line in enumerate(text.splitlines(), 1):
        if header := re.match(r"\s*\[([^\[\]]+)\]", line):
            section = header[1].replace('"', "").strip() + "."
            lines[section[:-1]] = number
        elif entry := re.match(r"\s*([\w.-]+)\s*=", line):
            lines[section + entry[1]] = number
    return lines


def _from_env(env: Mapping[str, str]) -> Iterator[tuple[str, Any, str]]:
    for name in sorted(env):
        if name.startswith(ENV_PREFIX):
            parts = name.removeprefix(ENV_PREFIX).lower().split("__")
            if parts[0] == "data" and len(parts) == 3:
                parts[1] = parts[1].replace("_", "-")  # task names are written with dashes
            key = ".".join(parts)
            yield key, _from_text(key, env[name]), f"environment {name}"


def _from_overrides(overrides: Iterable[str]) -> Iterator[tuple[str, Any, str]]:
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"--set {text}: write it as KEY=VALUE, for example `--set train.seed=1`")
        yield key.strip(), _from_text(key.strip(), value.strip()), "--set"


def _from_text(key: str, text: str) -> Any:
    """A value as typed in a shell; numbers and booleans are left to the model's own validation."""
    known = pattern(key)
    if known is None:
        return text
    kind = fields()[known].annotation
    if get_origin(kind) in (Union, types.UnionType) and text.lower() in ("", "none"):
        return None
    if get_origin(kind) is tuple:
        return tuple(_unquoted(part.strip()) for part in text.strip("[]() ").split(",") if part.strip())
    if get_origin(kind) is Literal:
        return {str(choice): choice for choice in get_args(kind)}.get(text, text)
    return text


def _unquoted(part: str) -> str:
    """An entry of a list without the quotes that it has in a file and need not have in a shell."""
    return part[1:-1] if len(part) > 1 and part[0] == part[-1] in "\"'" else part


def _resolve(key: str, value: Any, base: Path) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(_resolve(key, part, base) for part in value)  # type: ignore[reportUnknownVariableType]
    if not isinstance(value, str) or not value:
        return value
    if address := ADDRESS.fullmatch(f"{value}/" if value.lower() == "s3:" else value):
        return f"{address[1].lower()}://{address[2].removeprefix('/')}"
    path = Path(os.path.abspath(base / Path(value).expanduser()))
    is_path = pattern(key) in _PATHS or (
        pattern(key) in _NAMES_OR_PATHS and (value.startswith((".", "/", "~")) or path.exists())
    )
    return str(path) if is_path else value


def _nest(values: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for key, value in values.items():
        if "*" in key:
            continue
        *sections, name = key.split(".")
        table = nested
        for section in sections:
            table = table.setdefault(section, {})
        table[name] = value
    return nested


def _is_section(key: str) -> bool:
    head, dot, task = key.partition(".")
    names = {key, f"{head}.*"} if dot and "." not in task else {key}
    return any(known.startswith(f"{name}.") for known in fields() for name in names)


def _nearest(key: str) -> str:
    last = key.rsplit(".", 1)[-1]

    def likeness(known: str) -> float:
        ends = difflib.SequenceMatcher(None, last, known.rsplit(".", 1)[-1]).ratio()
        return max(difflib.SequenceMatcher(None, key, known).ratio(), 0.95 * ends)

    if _is_section(key):
        return f"; it is a section: write `[{key}]` with keys under it"
    closest = max(map(likeness, fields()))
    if closest < 0.6:
        return "; `vlm-dist config show` lists every setting"
    best = [name for name in fields() if likeness(name) > closest - 0.05]
    return "; did you mean " + " or ".join(f"`{name}`" for name in best[:3]) + "?"


def _explain(error: ValidationError, values: Mapping[str, Any], origins: Mapping[str, str]) -> str:
    problems = error.errors(include_url=False)
    first = problems[0]
    path = [str(part) for part in first["loc"]]
    while path and ".".join(path) not in values and not _is_section(".".join(path)):
        path.pop()  # positions inside a list, members of a union
    key = ".".join(path)
    why = first["msg"].removeprefix("Value error, ").replace("Input should be", "expected", 1)
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    if key in values:
        about = (fields()[pattern(key) or key].description or "").rstrip(".")
        return f"{key} = {values[key]!r} ({origins.get(key, 'default')}): {why}; {about}{more}"
    given = ", ".join(f"{name} from {origin}" for name, origin in origins.items() if name.startswith(f"{key}."))
    return f"[{key}]: {why} ({given or 'default'}){more}"


def _scalar(value: Any) -> str | int | float | bool:
    if isinstance(value, (list, tuple)):
        return ", ".join(str(part) for part in value)  # type: ignore[reportUnknownArgumentType]
    return "none" if value is None else value
