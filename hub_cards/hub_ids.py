"""Names of models and datasets, as all packages take them: a folder of this machine, or "user/name" on the Hub."""

import re
from pathlib import Path

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers.utils import cached_file

HUB_ID = re.compile(r"[\w.\-]+/[\w.\-]+", re.ASCII)


def looks_like_hub_id(name: object) -> bool:
    """May it be "user/name" on the Hub, by its form?"""
    try:
        validate_repo_id(str(name))
    except HFValidationError:
        return False
    return bool(HUB_ID.fullmatch(str(name)))


def is_hub_id(name: object) -> bool:
    """Is it a Hub id, and no folder of this machine?"""
    return bool(name) and looks_like_hub_id(name) and not Path(str(name)).exists()


def file_of(source: str | Path, name: str, revision: str | None = None) -> str | None:
    """The path of a file of a folder or of a Hub repository; None if it has no such file."""
    missing = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    return cached_file(str(source), name, revision=revision, **missing)


def check_folder_or_hub_id(name: str, value: str | Path) -> None:
    """Raises `ValueError` where an argument of this name is neither."""
    if not Path(value).is_dir() and not is_hub_id(value):
        raise ValueError(
            f"`{name}={str(value)!r}` is not allowed: there is no such folder, and a Hub id is 'user/name'."
        )
