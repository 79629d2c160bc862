"""Steps with results in a folder, which a later run can reuse."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from act_peft.disk.atomic import write_file
from act_peft.errors import ActValueError

RECORD = "results.json"

Report = Callable[[str], None]


class Steps:
    """Run steps, and record their results in the folder together with settings, versions and digests of their files.

    A recorded result is reused only if all of these are still the same. After a file was lost, changed or half
    replaced, the step runs again.
    """

    def __init__(self, output: Path, report: Report, overwrite: bool, *, owner: str) -> None:
        self.owner = owner  # of the folder, in messages: "a demo"
        self.output, self.report, self.overwrite = output, report, overwrite
        self.reused: list[str] = []
        self.path = output / RECORD
        if output.exists() and not output.is_dir():
            raise ActValueError(f"{output}: got a file, expected a folder (name another --output)")
        if output.exists() and any(output.iterdir()) and not self.path.is_file():
            raise ActValueError(
                f"{output}: the folder holds something other than {owner}, expected a new or empty one"
            )
        output.mkdir(parents=True, exist_ok=True)
        self.record = self._read()
        self._write()

    def run(self, name: str, settings: Mapping[str, Any], files: Sequence[str], work: Callable[[], Any]) -> Any:
        """The result of a step, from `work()` or from an earlier run; it must be JSON."""
        depends = {**settings, "versions": _versions()}
        known = self.record.get(name)
        if not self.overwrite and known and known["settings"] == depends and known["files"] == self._digests(files):
            self.report(f"{name}: reused")
            self.reused.append(name)
            return known["result"]
        started = time.perf_counter()
        result = work()
        self.record[name] = {"settings": depends, "files": self._digests(files), "result": result}
        self._write()
        self.report(f"{name} ({time.perf_counter() - started:.1f} s)")
        return result

    def _digests(self, names: Sequence[str]) -> dict[str, str]:
        """File inside the folder -> SHA-256 of its content."""
        files = [
            file
            for path in (self.output / name for name in names)
            for file in ([path] if path.is_file() else sorted(path.rglob("*")))
            if file.is_file()
        ]
        return {
            file.relative_to(self.output).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest() for file in files
        }

    def _read(self) -> dict[str, Any]:
        if not self.path.is_file():
            return {}
        try:
            record = json.loads(self.path.read_text(encoding="utf-8"))
            entries = record.values()
        except (ValueError, AttributeError, RecursionError) as error:
            raise ActValueError(
                f"{self.path}: cannot be read ({error}), expected the file of {self.owner} (remove it)"
            ) from error
        if not all(isinstance(entry, dict) and entry.keys() == {"settings", "files", "result"} for entry in entries):
            raise ActValueError(
                f"{self.path}: the entries are not those of {self.owner}, expected its file (remove it)"
            )
        return record

    def _write(self) -> None:
        write_file(self.path, (json.dumps(self.record, indent=2) + "\n").encode())


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("act-peft", "peft", "torch", "transformers", "trl")}
