"""Where a user's name leads: a local folder, or the files of a repository on the Hub."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from act_peft.errors import ActValueError

_HUB_ID = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")


def is_local(location: str | os.PathLike[str]) -> bool:
    """Whether a folder of this name is there; what is not is a Hub id."""
    return os.path.isdir(location)


def local_folder(
    location: str | os.PathLike[str], *, expected: str, files: Sequence[str], revision: str | None = None
) -> Path:
    """The folder itself, or the snapshot of a repository on the Hub.

    Args:
        location: a folder or a Hub id.
        expected: what should be there, for messages.
        files: names or patterns of the files that are downloaded from the Hub.
        revision: revision on the Hub; left aside for a folder.

    Raises:
        ActValueError: a file, no such folder, no such repository.
    """
    name = os.fspath(location)
    if is_local(name):
        return Path(name)
    if os.path.lexists(name):
        raise ActValueError(f"{name}: got a file, expected a folder with {expected}, or a Hub id")
    if not _HUB_ID.fullmatch(name):
        raise ActValueError(
            f"{name}: cannot be opened, expected a folder with {expected}, or a Hub id (there is no such folder; "
            "check the path)"
        )
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(files)))
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        raise ActValueError(
            f"{name}: cannot be opened, expected a folder with {expected}, or a Hub id ({str(error)[:300]})"
        ) from error
