"""Real digits as shards, and a backbone of a few seconds on them."""

from __future__ import annotations

import pytest
from tiny import tiny

from raydc import make_shards, pretrain


@pytest.fixture(scope="session")
def digits_shards(tmp_path_factory) -> str:
    """1,437 train and 360 val images of 8 x 8 pixels, 10 classes."""
    place = tmp_path_factory.mktemp("digits") / "shards"
    make_shards("digits", str(place), val_fraction=0.2, use_ray=False, progress=False)
    return str(place)


@pytest.fixture(scope="session")
def run_dir(tmp_path_factory) -> str:
    """A finished run."""
    place = tmp_path_factory.mktemp("runs") / "tiny"
    pretrain(tiny(place, epochs=1))
    return str(place)
