"""Cases: one target, one damaged file, one outcome."""

from __future__ import annotations

import random
import shutil
import signal
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import act_peft
from act_peft import ActError
from tests.fuzz.damage import damages_of
from tests.fuzz.targets import TARGETS, Refused, Target, WrongAcceptance, digest, quiet

PACKAGE = str(Path(act_peft.__file__).parent)
SECONDS = 30  # a case that takes longer hangs


class Outcome(Enum):
    """What became of a damaged file."""

    EQUAL = "accepted, equal to the whole file"
    DIFFERENT = "accepted, different but valid"
    OURS = "refused with an error of ours"
    FOREIGN = "refused by other code that reads it first"
    BARE = "an error of other code through act_peft"
    WRONG = "accepted what must be refused"
    HANG = "hangs"

    @property
    def is_fault(self) -> bool:
        """Whether it may not happen."""
        return self in (Outcome.BARE, Outcome.WRONG, Outcome.HANG)


@dataclass(frozen=True)
class Case:
    """A case and its outcome."""

    target: str
    name: str
    outcome: Outcome
    text: str

    def __str__(self) -> str:
        return f"{self.outcome.name}: {self.target}: {self.name}: {self.text}"


class Hangs(BaseException):
    """The time is over."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    def stop(number: int, frame: object) -> None:
        raise Hangs

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def files_of(target: Target, originals: Path) -> list[str]:
    """The files that are damaged; a pattern stands for the first one."""
    found = [sorted(originals.glob(pattern))[0] for pattern in target.files]
    return [str(path.relative_to(originals)) for path in found]


def run_case(target: Target, number: str, originals: Path, work: Path, whole: dict[tuple[str, str], str]) -> Case:
    """Damage a copy of the files, and run the target on it.

    Args:
        target: the entry point.
        number: seed of the case.
        originals: the whole files.
        work: a folder that is emptied first.
        whole: target and file -> digest of the result with whole files; filled in here.
    """
    chance = random.Random(f"{target.name} {number}")
    file = chance.choice(files_of(target, originals))
    damage = chance.choice(damages_of(originals / file))
    if (target.name, file) not in whole:
        whole[target.name, file] = digest(_read(target, originals, work, file))
    _renew(originals, work)
    with quiet():
        damage(work / file, chance)
        outcome, text = _outcome(target, work, file, whole[target.name, file])
    return Case(target.name, f"{number} ({damage.__name__} of {file})", outcome, text)


def _renew(originals: Path, work: Path) -> None:
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(originals, work)


def _read(target: Target, originals: Path, work: Path, file: str) -> object:
    _renew(originals, work)
    with quiet():
        return target.run(work, file)


def _outcome(target: Target, work: Path, file: str, expected: str) -> tuple[Outcome, str]:
    try:
        with time_limit(SECONDS):
            found = digest(target.run(work, file))
    except (ActError, Refused) as error:
        return Outcome.OURS, _short(error, work)
    except Hangs as error:
        return Outcome.HANG, _place(error)
    except WrongAcceptance as error:
        return Outcome.WRONG, _short(error, work)
    except Exception as error:
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.startswith(PACKAGE)]
        ours = bool(frames) or not target.foreign
        return (Outcome.BARE if ours else Outcome.FOREIGN), f"{_short(error, work)} [{_place(error)}]"
    return (Outcome.EQUAL if found == expected else Outcome.DIFFERENT), ""


def _short(error: BaseException, work: Path) -> str:
    return f"{type(error).__name__}: {error}".replace(str(work), "").replace("\n", " ")[:240]


def _place(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if f.filename.startswith(PACKAGE)]
    return ", ".join(f"{Path(f.filename).name}:{f.lineno}" for f in [*ours[-2:], *frames[-1:]])


def run_cases(
    numbers: Iterable[int], originals: Path, work: Path, *, seed: int = 0, only: Sequence[str] = ()
) -> Iterator[Case]:
    """Cases of all targets in turns.

    Args:
        numbers: the cases; case n is for target n modulo their number.
        originals: the whole files.
        work: a folder for copies.
        seed: another one gives other cases.
        only: names of targets; all by default.
    """
    targets = [target for target in TARGETS if not only or target.name in only]
    whole: dict[tuple[str, str], str] = {}
    for number in numbers:
        yield run_case(targets[number % len(targets)], f"{seed}.{number}", originals, work, whole)


def table(cases: Iterable[Case]) -> str:
    """How often each outcome occurred, by target."""
    counts = Counter((case.target, case.outcome) for case in cases)
    names = list(dict.fromkeys(target for target, _ in counts))
    lines = [f"{'':32}" + "".join(f"{outcome.name:>10}" for outcome in Outcome)]
    for name in [*names, ""]:
        row = [sum(n for (t, o), n in counts.items() if o is outcome and name in ("", t)) for outcome in Outcome]
        lines.append(f"{name or 'all':32}" + "".join(f"{n:10}" for n in row))
    return "\n".join(lines)
