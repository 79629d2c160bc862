"""Regular expressions from files, matched in a time that their author does not choose.

Python's `re` tries one way after the other, which takes exponential time for some expressions. This one follows all
ways at once: its time grows with the length of the expression times that of the name. It knows what names of modules
need: characters, classes, groups, alternatives, repetitions, `^` and `$`. Anything else is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from act_peft.errors import ActValueError

_TOKEN = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\(\?:|[*+?]\??|\{\d{1,3}(?:,\d{0,3})?\}|.", re.DOTALL)
_LONGEST = 1000  # characters of an expression
_STATES = 1000  # of its automaton; repetitions with a number are written out
_DEEPEST = 20  # groups within groups
_PLAIN = re.compile(r"\^?(?:[\w.-]|\\[.-])*\$?")  # names, which `re` matches quickly
_REPEATS = {"*": (0, None), "+": (1, None), "?": (0, 1)}


@dataclass
class _State:
    """A state of an automaton: after a character that fits, or without one, it goes on to others."""

    fits: re.Pattern[str] | None = None  # of one character
    only_at: str | None = None  # "^" or "$": passed at the beginning or the end only
    to: list[int] = field(default_factory=list)


class LinearPattern:
    """A regular expression that is matched in linear time.

    Args:
        text: the expression.

    Raises:
        ActValueError: if it is none, is too long, or uses more than what is known here.
    """

    def __init__(self, text: str) -> None:
        self._text = text
        if len(text) > _LONGEST:
            raise self._refuse(f"it has {len(text)} characters, at most {_LONGEST} are read")
        self._tokens = _TOKEN.findall(text)
        self._at = 0
        self._states: list[_State] = []
        first, self._last = self._alternatives(depth=0)
        if self._at < len(self._tokens):
            raise self._refuse("a bracket is closed that was not opened")
        self._first = first

    @property
    def size(self) -> int:
        """Number of states, of which every character of a name may reach all."""
        return len(self._states)

    def matches(self, name: str, *, suffixes: bool = False) -> bool:
        """Whether the expression matches the whole name, or with `suffixes` that or what follows one of its dots."""
        now = self._reached([self._first], name, 0)
        for position in range(len(name)):
            going = [
                target
                for number in now
                if (fits := self._states[number].fits) is not None and fits.match(name[position])
                for target in self._states[number].to
            ]
            if suffixes and name[position] == ".":
                going.append(self._first)
            now = self._reached(going, name, position + 1)
        return self._last in now

    def _reached(self, states: Iterable[int], name: str, position: int) -> set[int]:
        """These states and all that follow without a character."""
        waiting, found = list(states), set()
        while waiting:
            number = waiting.pop()
            state = self._states[number]
            if number in found or (state.only_at == "^" and position) or (state.only_at == "$" and name[position:]):
                continue
            found.add(number)
            if state.fits is None:
                waiting += state.to
        return found

    # Every method below reads tokens and returns the first and the last state of what it has read.

    def _alternatives(self, *, depth: int) -> tuple[int, int]:
        if depth > _DEEPEST:
            raise self._refuse(f"more than {_DEEPEST} groups lie within each other")
        first, last = self._new(), self._new()
        while True:
            a, b = self._sequence(depth=depth)
            self._states[first].to.append(a)
            self._states[b].to.append(last)
            if self._peek() != "|":
                return first, last
            self._at += 1

    def _sequence(self, *, depth: int) -> tuple[int, int]:
        first = last = self._new()
        while self._peek() not in ("", "|", ")"):
            begin = self._at
            a, b = self._atom(depth=depth)
            least, most = self._repetition()
            end = self._at
            for _ in range(max(least - 1, 0)):  # written out: read it again
                self._states[last].to.append(a)
                last, (a, b) = b, self._again(begin, depth)
            optional = 0 if most is None else most - max(least, 1)
            last = self._append(last, a, b, skip=least == 0, loop=most is None)
            for _ in range(optional):
                a, b = self._again(begin, depth)
                last = self._append(last, a, b, skip=True, loop=False)
            self._at = end
        return first, last

    def _append(self, last: int, a: int, b: int, *, skip: bool, loop: bool) -> int:
        end = self._new()
        self._states[last].to.append(a)
        self._states[b].to.append(end)
        if skip:
            self._states[last].to.append(end)
        if loop:
            self._states[b].to.append(a)
        return end

    def _again(self, begin: int, depth: int) -> tuple[int, int]:
        self._at = begin
        return self._atom(depth=depth)

    def _repetition(self) -> tuple[int, int | None]:
        token = self._peek()
        if token[:1] in _REPEATS and token:
            self._at += 1
            return _REPEATS[token[0]]
        if token.startswith("{") and len(token) > 1:
            self._at += 1
            least, comma, most = token[1:-1].partition(",")
            numbers = int(least), (int(most) if most else None) if comma else int(least)
            if numbers[1] is not None and not max(numbers[0], 1) <= numbers[1]:
                raise self._refuse(f"{token} is no range")
            return numbers
        return 1, 1

    def _atom(self, *, depth: int) -> tuple[int, int]:
        token = self._tokens[self._at]
        self._at += 1
        if token in ("(", "(?:"):
            if self._peek() == "?" or self._peek() == "??":
                raise self._refuse("it has a group of a special kind")
            inside = self._alternatives(depth=depth + 1)
            if self._peek() != ")":
                raise self._refuse("a bracket is not closed")
            self._at += 1
            return inside
        state = self._new()
        if token in ("^", "$"):
            self._states[state].only_at = token
            return state, state
        if token[0] in "*+?{" or (token[0] == "\\" and (token[1:].isdigit() or token[1:] in ("A", "Z", "b", "B", ""))):
            raise self._refuse(f"{token!r} is not known at its place")
        try:
            self._states[state].fits = re.compile(token, re.DOTALL)
        except re.error as error:
            raise self._refuse(str(error)) from error
        end = self._new()
        self._states[state].to.append(end)
        return state, end

    def _peek(self) -> str:
        return self._tokens[self._at] if self._at < len(self._tokens) else ""

    def _new(self) -> int:
        if len(self._states) >= _STATES:
            raise self._refuse("its repetitions are too many")
        self._states.append(_State())
        return len(self._states) - 1

    def _refuse(self, reason: str) -> ActValueError:
        return ActValueError(
            f"regular expression {self._text[:80]!r}: {reason}, expected characters, classes, groups, "
            "alternatives and repetitions (write the names of the modules in its place)"
        )


class KeyPatterns:
    """The keys of a setting like PEFT's `alpha_pattern`: expressions for whole names or for what follows a dot.

    Args:
        keys: the expressions.
        most: number of keys that are read.

    Raises:
        ActValueError: if a key is no expression that can be matched in linear time, or they are too many.
    """

    def __init__(self, keys: Iterable[str], *, most: int) -> None:
        self._plain: dict[str, re.Pattern[str]] = {}
        self._linear: dict[str, LinearPattern] = {}
        self._keys = list(keys)
        for key in self._keys:
            if _PLAIN.fullmatch(key):
                self._plain[key] = re.compile(rf"(?:.*\.)?{key}$")
            else:
                self._linear[key] = LinearPattern(key)
        if len(self._keys) > most or sum(pattern.size for pattern in self._linear.values()) > 2 * _STATES:
            raise ActValueError(
                f"got {len(self._keys)} regular expressions, expected at most {most}, and few that are not names "
                "(write the names of the modules)"
            )

    def first(self, name: str) -> str | None:
        """The first key that matches a name; None if none does."""
        return next((key for key in self._keys if self._matches(key, name)), None)

    def _matches(self, key: str, name: str) -> bool:
        if key in self._plain:
            return self._plain[key].match(name) is not None
        return self._linear[key].matches(name, suffixes=True)
