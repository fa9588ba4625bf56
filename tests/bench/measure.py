"""What the measuring scripts share: two things timed in turns, and rows as they print and write them."""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path


def seconds(work: Callable) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def in_turns(first: Callable, second: Callable, repeats: int = 3) -> list[tuple[float, float]]:
    """Pairs of seconds, A B A B ...: what else the machine does hits both."""
    return [(seconds(first), seconds(second)) for _ in range(repeats)]


def median_ratio(pairs: list[tuple[float, float]]) -> float:
    """Median over the pairs of first / second."""
    return statistics.median(first / second for first, second in pairs)


class Rivals:
    """Processes that say they are ready, and from then on answer each line with a number."""

    def __init__(self, commands: list[list[str]]) -> None:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.processes = [subprocess.Popen([sys.executable, *command], **pipes) for command in commands]
        for process in self.processes:
            process.stdout.readline()

    def ask(self) -> list[float]:
        """The answer of each, while all of them work."""
        for process in self.processes:
            process.stdin.write("go\n")
            process.stdin.flush()
        return [float(process.stdout.readline()) for process in self.processes]

    def close(self) -> None:
        for process in self.processes:
            process.stdin.close()
            process.wait()


def answer(work: Callable[[], float]) -> None:
    """The other side of ``Rivals``."""
    print("ready", flush=True)
    for _ in sys.stdin:
        print(work(), flush=True)


def row(name: str, value: float, must: float, aim: float, quality: dict | None, *, least: bool = True) -> dict:
    """One line of the table; ``least``: the value must be at least ``must``, otherwise at most."""
    ok = value >= must if least else value <= must
    return {"row": name, "value": round(value, 4), "must": must, "aim": aim, "ok": bool(ok), "quality": quality}


def parser(doc: str | None) -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--json", type=Path, help="write the rows to this file")
    options.add_argument("--repeats", type=int, default=3)
    return options


def finish(rows: list[dict], file: Path | None) -> None:
    """Print the rows and write them."""
    for one in rows:
        verdict = "reached" if one["ok"] else "MISSED"
        print(f"row {one['row']}: {one['value']:g} (must {one['must']:g}, aim {one['aim']:g}): {verdict}; {one['quality']}")
    if file is not None:
        file.write_text(json.dumps(rows, indent=2) + "\n")
