"""Steps whose results are kept in a folder, so that a later run can reuse them."""

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
    """Runs steps and records their results in the folder, with what they depend on.

    A recorded result is reused if settings, versions and the digests of the step's files are the recorded ones; so a
    file that was lost, changed or only half replaced makes the step run again.
    """

    def __init__(self, output: Path, report: Report, overwrite: bool) -> None:
        self.output, self.report, self.overwrite = output, report, overwrite
        self.reused: list[str] = []
        self.path = output / RECORD
        if output.exists() and not output.is_dir():
            raise ActValueError(f"{output}: got a file, expected a folder (name another --output)")
        if output.exists() and any(output.iterdir()) and not self.path.is_file():
            raise ActValueError(f"{output}: the folder holds something else than a demo, expected a new or empty one")
        output.mkdir(parents=True, exist_ok=True)
        self.record = self._read()
        self._write()

    def run(self, name: str, settings: Mapping[str, Any], files: Sequence[str], work: Callable[[], Any]) -> Any:
        """The result of a step, which must be JSON: of `work()`, or of an earlier run."""
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
        except (ValueError, AttributeError) as error:
            raise ActValueError(
                f"{self.path}: cannot be read ({error}), expected what a demo wrote (remove it)"
            ) from error
        if not all(isinstance(entry, dict) and entry.keys() == {"settings", "files", "result"} for entry in entries):
            raise ActValueError(
                f"{self.path}: got other entries than a demo's, expected what a demo wrote (remove it)"
            )
        return record

    def _write(self) -> None:
        write_file(self.path, (json.dumps(self.record, indent=2) + "\n").encode())


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("act-peft", "peft", "torch", "transformers", "trl")}
