"""What the session shares: one local Ray, the real images, digits as shards and a backbone of a few seconds on them."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

os.environ.setdefault("RAY_AUTH_MODE", "disabled")
# As raydc.launch sets it, for tests that import Ray before that: workers are plain processes, not `uv run` ones.
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
os.environ.pop("RAY_ADDRESS", None)

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data"


@pytest.fixture(scope="session")
def real_data(tmp_path_factory) -> Path:
    """The unpacked sets: cifar10/{train,test}/CLASS/*, imagenette224/{train,val}/WNID/*, imagewoof320 likewise."""
    script = SHARED / "unpack.sh"
    if not script.exists():
        pytest.skip("the folder of real images beside the project (../shared/data) is not here")
    done = subprocess.run(["bash", script], check=True, capture_output=True, text=True)
    return Path(done.stdout.strip().splitlines()[-1])


@pytest.fixture(scope="session")
def official_lists() -> Path:
    """The folder of imagenet_meta/imagenet_subsets/{1percent,10percent}.txt and voc12_lists/train_aug.txt."""
    if not SHARED.exists():
        pytest.skip("the folder of official lists beside the project (../shared/data) is not here")
    return SHARED


@pytest.fixture(scope="session")
def local_ray():
    """Ray with more logical CPUs than workers, so that data tasks always find one."""
    from raydc import launch

    # Workers import the tests' own loops by name.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT / "tests"), os.environ.get("PYTHONPATH")]))
    launch.attach(5)
    import ray

    yield ray
    ray.shutdown()


@pytest.fixture(scope="module")
def one_thread():
    """Small tensors are fastest so, above all on a busy machine."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def digits_shards(tmp_path_factory) -> str:
    """1,437 train and 360 val images of 8 x 8 pixels, 10 classes."""
    from raydc import make_shards

    place = tmp_path_factory.mktemp("digits") / "shards"
    make_shards("digits", str(place), val_fraction=0.2, use_ray=False, progress=False)
    return str(place)


@pytest.fixture(scope="session")
def run_dir(tmp_path_factory) -> str:
    """A finished run."""
    from tiny import tiny

    from raydc import pretrain

    place = tmp_path_factory.mktemp("runs") / "tiny"
    pretrain(tiny(place, epochs=1))
    return str(place)


@pytest.fixture(scope="module")
def place(tmp_path_factory, digits_shards, run_dir) -> Path:
    """A folder with both, as ``shards`` and ``run``, for commands that write beside them."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "shards").symlink_to(digits_shards)
    (folder / "run").symlink_to(run_dir)
    return folder
