"""A run of seconds on real digits, for tests of the loop."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from raydc.config import Config
from raydc.recipes import digits


def tiny(run_dir: Path, *, epochs: int = 3, num_workers: int = 0, **sections) -> Config:
    """The digits recipe at a tenth of its work; ``train={...}`` and the like change a section's fields."""
    config = replace(digits(), run_dir=str(run_dir), num_workers=num_workers)
    sections["train"] = {"epochs": epochs, "batch_size": 128, "plan_length": 1.0, "threads": 1} | sections.get("train", {})
    sections["model"] = {"width": 4, "stem_stride": 2} | sections.get("model", {})
    sections["probe"] = {"every": 0} | sections.get("probe", {})
    top = {key: sections.pop(key) for key in list(sections) if not isinstance(sections[key], dict)}
    return replace(config, **top, **{name: replace(getattr(config, name), **values) for name, values in sections.items()})


def assignments(run_dir: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Per committed epoch: clusters and distances in the order of image_id."""
    found = {}
    for file in sorted(Path(run_dir, "assignments").glob("*.parquet")):
        table = pq.read_table(file).sort_by("image_id")
        assert table["image_id"].to_numpy().tolist() == list(range(table.num_rows))
        found[file.stem] = table["cluster"].to_numpy(), table["distance"].to_numpy()
    return found


def assert_same_assignments(one: Path, other: Path) -> None:
    """Bit for bit, in every epoch."""
    left, right = assignments(one), assignments(other)
    assert left.keys() == right.keys()
    assert len(left) > 0
    for epoch, (clusters, distances) in left.items():
        np.testing.assert_array_equal(clusters, right[epoch][0], err_msg=epoch)
        np.testing.assert_array_equal(distances, right[epoch][1], err_msg=epoch)
