"""metrics.jsonl: a line at the end of each phase. Nobody else writes metrics."""

from __future__ import annotations

import json
import math

from raydc.config import Config
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

    def rewind(self, epoch: int, keep: tuple[str, ...] | None = None) -> None:
        """Forget lines of what is about to be done again: all after ``epoch``; of ``epoch``, training and all phases that
        are not among ``keep`` (None: no others)."""

        def stays(line: dict) -> bool:
            if line["epoch"] != epoch:
                return line["epoch"] < epoch
            return line["phase"] not in ("train", "remember") and (keep is None or line["phase"] in keep)

        kept = list(filter(stays, self.lines))
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


def sentence(line: dict, config: Config) -> str | None:
    """A line of the journal as a person reads it."""
    head = f"epoch {line['epoch']:>3}/{config.train.epochs}  {line['phase'].partition('_')[0]:<8}"
    if line["phase"] in ("extract", "train"):
        wait = line["waiting_s"] / max(line["seconds"], 1e-9)
        text = f"{head}{line['seconds']:>7.1f} s  {line['images_per_s']:>8,.0f} img/s  waiting {wait:>3.0%}"
        if line["phase"] == "train":
            text += f"  loss {line['loss']:.3f} (ln k {math.log(line['num_clusters']):.3f})"
        elif line["num_unreadable"]:
            text += f"  {line['num_unreadable']} unreadable"
        if line.get("pca_s", 0) >= 1:
            text += f"  then {line['pca_s']:.1f} s of PCA"
        return text
    if line["phase"] == "cluster":
        nmi = f"NMI previous {_figure(line['nmi_previous'])}, labels {_figure(line['nmi_labels'])}"
        which = f"head {line['head']}: " if "head" in line else ""
        counts = f"{line['num_clusters']} clusters, {line['num_empty_clusters']} empty"
        return f"{head}{line['seconds']:>7.1f} s  {which}{counts}  {nmi}"
    if line["phase"].startswith("probe"):
        row = {"probe": "trained", "probe_untouched": "random init", "probe_adapted": "random init, BN adapted"}
        name = row.get(line["phase"], "raw pixels")
        figures = f"20-NN {_figure(line['knn_top1'])}, linear {_figure(line['linear_top1'])}"
        return f"{head}{line['seconds']:>7.1f} s  {name}: {figures}"
    return None


def _figure(value: float | None) -> str:
    return "  - " if value is None else f"{value:.3f}"
