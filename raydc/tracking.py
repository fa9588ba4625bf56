"""metrics.jsonl: a line at the end of each phase. Nobody else writes metrics."""

from __future__ import annotations

import json

from raydc.storage import Folder

FILE = "metrics.jsonl"


class Journal:
    """The lines of a run; {epoch, phase, ...}. The file is rewritten and renamed at each line, so it is always whole."""

    def __init__(self, folder: Folder) -> None:
        self.folder = folder
        text = folder.read(FILE).decode() if folder.exists(FILE) else ""
        self.lines: list[dict] = [json.loads(line) for line in text.splitlines() if line]

    def add(self, epoch: int, phase: str, **values) -> dict:
        line = {"epoch": epoch, "phase": phase, **values}
        self.lines.append(line)
        self._write()
        return line

    def rewind(self, epoch: int, phases: tuple[str, ...] = ()) -> None:
        """Forget lines of what is about to be done again: everything from ``epoch`` on, but its finished ``phases``."""
        kept = [a for a in self.lines if a["epoch"] < epoch or (a["epoch"] == epoch and a["phase"] in phases)]
        if len(kept) < len(self.lines):
            self.lines = kept
            self._write()

    def last(self, phase: str, key: str):
        """The newest value of ``key`` in lines of ``phase``, or None."""
        values = [line[key] for line in self.lines if line["phase"] == phase and line.get(key) is not None]
        return values[-1] if values else None

    def all(self, phase: str, key: str) -> list:
        return [line[key] for line in self.lines if line["phase"] == phase and line.get(key) is not None]

    def _write(self) -> None:
        self.folder.write(FILE, "".join(json.dumps(line) + "\n" for line in self.lines))
