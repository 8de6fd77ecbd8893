"""Errors that a user can cause: every message says what is wrong, where, and what to do (imports nothing)."""


class VlmDistError(Exception):
    """Base of all errors that end a command with one red line; `exit_code` is what the shell sees."""

    exit_code = 1


class ConfigError(VlmDistError, ValueError):
    """Wrong usage or configuration: an unknown key, a bad value, a machine that lacks what was asked."""

    exit_code = 2


class StoreError(VlmDistError, ValueError):
    """A feature store that is absent, damaged, of another schema, or of another extractor."""


class StoreUnreachableError(StoreError):
    """A store's place, or this node's copy of it, that cannot be read now: says nothing of the store's own state."""


class ExtractionError(VlmDistError, ValueError):
    """A video or an encoder that cannot give features; `reason` is a short stable code for tables."""

    def __init__(self, message: str, reason: str = "error") -> None:
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[type, tuple[object, ...]]:
        return type(self), (str(self), self.reason)


class CheckpointError(VlmDistError, ValueError):
    """A checkpoint that is damaged, of another shape, or of another vocabulary."""


class TaskDataError(VlmDistError, ValueError):
    """Annotations of an end task that are missing, malformed, or do not fit the store."""


class TrainingError(VlmDistError, RuntimeError):
    """A training run that could not go on; names the first error of the first rank that failed."""


class JobError(VlmDistError, RuntimeError):
    """A run, a tracking server or a cluster that is not there or not in the state that was asked."""
