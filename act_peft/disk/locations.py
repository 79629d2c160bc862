"""Paths and Hub ids: which local folder they mean, and files that are downloaded when they are needed."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from act_peft.disk.folders import file_in
from act_peft.errors import ActValueError

_HUB_ID = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")


def lasting_name(name: str | os.PathLike[str]) -> str:
    """A name that means the same elsewhere: the absolute path of a folder, any other name (a Hub id) as it is."""
    text = os.fspath(name)
    return os.path.abspath(text) if os.path.isdir(text) else text


@dataclass(frozen=True)
class Location:
    """A folder, or the local snapshot of a repository on the Hub. Made by `open_location`.

    Attributes:
        name: the path or Hub id that the user gave.
        folder: the local folder.
        is_local: whether the user named a folder.
    """

    name: str
    folder: Path
    is_local: bool

    def file(self, name: str) -> Path:
        """The real path of one file, which is downloaded first where needed.

        Raises:
            ActValueError: if it is missing, cannot be downloaded, or lies outside the folder.
        """
        if not self.is_local and not (self.folder / name).exists():
            try:
                hf_hub_download(self.name, name, revision=self.folder.name)
            except (OSError, HfHubHTTPError, HFValidationError) as error:
                raise ActValueError(
                    f"{self.name}: {name} cannot be downloaded ({str(error)[:300]}), expected it in the repository"
                ) from error
        return file_in(self.folder, name)


def open_location(
    location: str | os.PathLike[str] | Location, *, expected: str, files: Sequence[str], revision: str | None = None
) -> Location:
    """Find a folder, or download the snapshot of a repository on the Hub.

    Args:
        location: a folder or a Hub id; an open location is returned as it is.
        expected: what should be there, for messages.
        files: names or patterns of the files to download now.
        revision: revision on the Hub; ignored for a folder.

    Raises:
        ActValueError: if it is a file, or there is no such folder or repository.
    """
    if isinstance(location, Location):
        return location
    name = os.fspath(location)
    if os.path.isdir(name):  # every other name is a Hub id
        return Location(name, Path(name), True)
    if os.path.lexists(name):
        raise ActValueError(f"{name}: got a file, expected a folder with {expected}, or a Hub id")
    if not _HUB_ID.fullmatch(name):
        raise ActValueError(
            f"{name}: cannot be opened, expected a folder with {expected}, or a Hub id (there is no such folder; "
            "check the path)"
        )
    try:
        return Location(name, Path(snapshot_download(name, revision=revision, allow_patterns=list(files))), False)
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        raise ActValueError(
            f"{name}: cannot be opened, expected a folder with {expected}, or a Hub id ({str(error)[:300]})"
        ) from error
