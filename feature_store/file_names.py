"""Video ids ↔ file names that any file system takes and that lead nowhere else (store → export → import)."""

from collections.abc import Sequence
from pathlib import PurePosixPath
from urllib.parse import quote, unquote

_LONGEST = 200  # bytes of one name; file systems take 255, and a temporary name is longer
_GOES_ON = "%"  # at the end of a name, where no quoted byte can be: the rest is in the folder of this name


def path_of_id(video_id: str, suffix: str) -> PurePosixPath:
    """A relative path for an id: letters, digits and `_-~.` stay, every other byte becomes `%XX`.

    `..`, `/`, a leading dot and the empty id are all harmless; an id that is too long for a name goes on in a folder.
    """
    quoted = quote(video_id, safe="")
    parts = [_shown(quoted[at : at + _LONGEST]) for at in range(0, len(quoted), _LONGEST)] or [_GOES_ON]
    return PurePosixPath(*(part + _GOES_ON for part in parts[:-1]), parts[-1] + suffix)


def id_of_path(parts: Sequence[str], suffix: str) -> str:
    """The id that `path_of_id` made the parts of a relative path from."""
    names = [*parts[:-1], parts[-1].removesuffix(suffix)]
    return unquote("".join(name.removesuffix(_GOES_ON) for name in names))


def _shown(name: str) -> str:
    """No name of ours is hidden, or one of the two that mean a folder."""
    return "%2E" + name[1:] if name.startswith(".") else name
