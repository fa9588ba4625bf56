"""What the command lines of all jobs do alike: one sentence for what is wrong, one exit code for each way to end."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import re
import signal
import sys
import threading
import types
import typing
from collections.abc import Callable, Collection, Iterator
from difflib import SequenceMatcher

import tyro

from raydc.config import RunError, UsageError

Hints = dict[str, object]  # of each flag, the type of its value

# --- from words to a dataclass ------------------------------------------------------------------------------------------


def take_name(arguments: list[str], names: Collection[str], what: str, default: str) -> tuple[str, list[str]]:
    """The name that stands first (``default`` where a field does), and the arguments after it.

    UsageError for a name that is none of ``names``; ``what`` is the word for them.
    """
    if not arguments or arguments[0].startswith("-"):
        return default, arguments
    name, *rest = arguments
    if name not in names:
        guess = nearest(name, names)
        hint = f"did you mean {guess}? There are" if guess else "there are"
        raise UsageError(f"there is no {what} {name!r}; {hint} {', '.join(names)}")
    return name, rest


def parse(cls: type, arguments: list[str], *, prog: str, description: str, default=None, names: Collection[str] = ()):
    """An instance of the dataclass ``cls``, with the fields of ``default`` where ``arguments`` do not set them.

    UsageError for what cannot be understood. ``names`` are words that ``take_name`` takes and that come too late here.
    """
    hints = _hints(cls)
    options = {} if default is None else {"default": default}
    said = io.StringIO()  # the parser's own words come in boxes of many lines
    try:
        with contextlib.redirect_stderr(said):
            found, unknown = tyro.cli(
                cls, args=arguments, prog=prog, description=description, return_unknown_args=True, **options
            )
    except SystemExit as stop:
        if stop.code in (0, None):  # --help
            raise
        raise UsageError(_refused(said.getvalue(), arguments, hints, _required(cls))) from None
    if unknown:
        raise UsageError(_unknown(unknown[0], arguments, hints, names, prog.split()[0]))
    return found


def nearest(word: str, known: Collection[str]) -> str | None:
    """The most similar of the known words; one that begins or ends alike is near, however long the rest of it."""
    bare = word.lstrip("-")

    def likeness(one: str) -> tuple[float, float]:
        one = one.lstrip("-")
        pieces = (one, one[: len(bare) + 1], one[-len(bare) - 1 :])
        whole, *parts = (SequenceMatcher(None, bare, piece).ratio() for piece in pieces)
        return max(whole, *parts), whole

    best = max(known, key=likeness, default=None)
    return best if best is not None and likeness(best)[0] >= 0.6 else None


def _hints(cls: type, prefix: str = "") -> Hints:
    """``--section.field`` and its type, for every field on the command line."""
    found: Hints = {}
    for name, hint in typing.get_type_hints(cls, include_extras=True).items():
        marks = getattr(hint, "__metadata__", ())
        hint = typing.get_args(hint)[0] if marks else hint
        if dataclasses.is_dataclass(hint):
            found |= _hints(hint, f"{prefix}{name}.")
        elif not marks:  # those with marks are positional or hidden
            found[f"--{prefix}{name}".replace("_", "-")] = hint
    return found


def _required(cls: type) -> list[str]:
    missing = dataclasses.MISSING
    return [one.name.upper() for one in dataclasses.fields(cls) if one.default is missing and one.default_factory is missing]


def _unknown(word: str, arguments: list[str], hints: Hints, names: Collection[str], prog: str) -> str:
    """The sentence for a word that is no field and no value."""
    if word in names:
        after = " ".join(one for one in arguments if one != word)
        return f"{word} stands after the fields and must stand before them: {prog} {word} {after}"
    if not word.startswith("--"):
        return f"{word!r} belongs to no field; fields are given as --name VALUE, switches as --name or --no-name"
    flag = _flag(word)
    guess = nearest(flag, hints)
    return f"there is no {flag}; " + (f"did you mean {guess}?" if guess else "--help shows all there are")


def _refused(said: str, arguments: list[str], hints: Hints, required: list[str]) -> str:
    """The sentence for a value that is missing or of the wrong type, from the parser's box."""
    blocks = re.split(r".*[-─]{5}.*", said)  # title, reason and help, between rules; without a frame where there is no UTF-8
    reason = " ".join(line.strip("│ ") for line in blocks[min(1, len(blocks) - 1)].strip().splitlines())
    if required and reason.startswith("Missing from"):
        strange = next((one for one in arguments if one.startswith("--") and _flag(one) not in _known(hints)), None)
        if strange:
            return _unknown(strange, arguments, hints, (), "")
        missing = [
            name for name in required if f"--{name.lower().replace('_', '-')}" not in {_flag(one) for one in arguments}
        ]
        return f"{' and '.join(missing or required)} must be given; --help shows what they are"
    flag = next(iter(re.findall(r"--[a-z][\w.-]*", reason)), "").replace("_", "-")
    takes = _takes(hints.get(flag))
    if takes is None:
        return reason or said.strip()
    value = _value(flag, arguments)
    return f"{flag} is {value}; give {takes}" if value else f"{flag} stands without a value; give {takes}"


def _flag(word: str) -> str:
    return word.partition("=")[0].replace("_", "-")


def _known(hints: Hints) -> set[str]:
    """All flags, with the other half of the switches."""
    return {*hints, *(f"--no-{name.removeprefix('--')}" for name in hints), "--help"}


def _value(flag: str, arguments: list[str]) -> str:
    """What follows the flag's last appearance."""
    pairs = [one.partition("=") for one in arguments]
    last = max((place for place, (name, _, _) in enumerate(pairs) if name.replace("_", "-") == flag), default=None)
    if last is None or pairs[last][1]:
        return "" if last is None else pairs[last][2]
    after = arguments[last + 1 :]
    end = next((place for place, one in enumerate(after) if one.startswith("--")), len(after))
    return " ".join(after[:end])


def _takes(hint) -> str | None:
    """What a field of this type is given, in words."""
    if isinstance(hint, types.UnionType):
        hint = next(one for one in typing.get_args(hint) if one is not type(None))
    if typing.get_origin(hint) is typing.Literal:
        return ", ".join(map(str, typing.get_args(hint)))
    if typing.get_origin(hint) is tuple:
        parts = typing.get_args(hint)
        if parts[0] not in (int, float):
            return _takes(parts[0])
        return "numbers" if Ellipsis in parts else f"{len(parts)} numbers"
    return {int: "a whole number", float: "a number", str: "one"}.get(hint)


# --- from a job to an exit code -----------------------------------------------------------------------------------------


def run(
    job: Callable[[], None], *, again: str, failures: tuple = (RunError, OSError), mistakes: tuple = (UsageError,)
) -> int:
    """The exit code: 0 done, 1 failed, 2 wrong usage, 130 after Ctrl-C, 143 after SIGTERM.

    ``again`` says what the same command does after a stop.
    """
    try:
        with _sigterm() as came:
            job()
    except BrokenPipeError:  # nobody reads on (``--help | head``); Python would try once more when it exits
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except failures as error:  # OSError: a disk that is full, a place that may not be written
        return _say(f"error: {error}", 1)
    except mistakes as error:
        return _say(f"error: {error}", 2)
    except KeyboardInterrupt:
        return _say(f"stopped by SIGTERM; {again}", 143) if came.is_set() else _say(f"stopped; {again}", 130)
    return 0


@contextlib.contextmanager
def _sigterm() -> Iterator[threading.Event]:
    """SIGTERM (a scheduler, ``kill``, ``ray job stop``) ends the work as Ctrl-C does, and sets the event.

    With the same exception too: Ray, waiting for a result, lets no other one through.
    """
    came = threading.Event()

    def stop(*_) -> None:
        came.set()
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():  # which alone may handle signals
        yield came
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield came
    finally:
        signal.signal(signal.SIGTERM, before)


def _say(text: str, status: int) -> int:
    print(text, file=sys.stderr, flush=True)
    return status
