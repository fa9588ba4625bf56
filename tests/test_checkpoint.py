"""What a run leaves behind: it comes back bit for bit, or says why not."""

import json
import subprocess
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from raydc import checkpoint
from raydc.checkpoint import (
    TrainState,
    load_assignment,
    load_backbone,
    load_state,
    save_assignment,
    save_backbone,
    save_state,
    weights_hash,
)
from raydc.clustering.assignment import Assignment
from raydc.config import Config, ImagesConfig, ModelConfig, UsageError
from raydc.models.backbone import build_backbone
from raydc.models.head import Classifier
from raydc.optim import build_optimizer
from raydc.recipes import RECIPES
from raydc.storage import Folder

MODEL = ModelConfig(architecture="resnet10", width=4, stem="small", sobel=True)
CONFIG = Config(recipe="tiny", model=MODEL, images=ImagesConfig(size=16, resize=20))


pytestmark = pytest.mark.usefixtures("one_thread")


def fresh(seed: int) -> TrainState:
    model = Classifier(build_backbone(MODEL, seed), 7)
    model.head.refresh(seed)
    return TrainState(model, build_optimizer(model.backbone, model.head, CONFIG.train))


def step(state: TrainState, seed: int) -> None:
    """One update on seeded pixels, so that weights, statistics and momentum all move."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (4, 3, 16, 16), generator=generator, dtype=torch.uint8)
    state.model.train()
    nn.functional.cross_entropy(state.model(pixels), torch.tensor([0, 1, 2, 3])).backward()
    state.optimizer.step()
    state.optimizer.zero_grad()


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_a_state_comes_back_bit_for_bit_and_goes_on_alike(tmp_path):
    folder, ours, theirs = Folder(tmp_path), fresh(0), fresh(1)
    step(ours, 10)
    save_state(folder, ours, epoch=4)
    load_state(folder, theirs)
    assert theirs.epoch == 5
    assert same(ours.model.state_dict(), theirs.model.state_dict())
    momenta = [
        {number: values["momentum_buffer"] for number, values in one.optimizer.state_dict()["state"].items()
         if values.get("momentum_buffer") is not None}
        for one in (ours, theirs)
    ]  # fmt: skip
    assert momenta[0] and same(*momenta)
    for one in (ours, theirs):
        step(one, 11)
    assert same(ours.model.state_dict(), theirs.model.state_dict()), "the next step is the same one"


def test_the_file_loads_with_weights_only(tmp_path):
    save_state(Folder(tmp_path), fresh(0), epoch=7)
    values = torch.load(tmp_path / "checkpoints" / "epoch_0007" / "state.pt", weights_only=True)
    assert values.keys() == {"epoch", "model", "optimizer"} and values["epoch"] == 8


def test_the_last_states_are_kept_and_the_last_is_loaded(tmp_path):
    folder, state = Folder(tmp_path), fresh(0)
    for epoch in range(12):
        save_state(folder, state, epoch)
    assert folder.names("checkpoints") == ["epoch_0010", "epoch_0011"]
    assert checkpoint.KEEP_STATES == 2
    load_state(folder, state)
    assert state.epoch == 12


def test_no_state_leaves_a_fresh_run_alone(tmp_path):
    state = fresh(3)
    before = {key: value.clone() for key, value in state.model.state_dict().items()}
    load_state(Folder(tmp_path), state)
    assert state.epoch == 0 and same(state.model.state_dict(), before)


def test_a_checkpoint_that_was_killed_half_way_does_not_count(tmp_path):
    folder, state = Folder(tmp_path), fresh(0)
    save_state(folder, state, 0)
    beside = tmp_path / "checkpoints" / "epoch_0001"
    beside.mkdir()
    (beside / "state.pt.12345678.part").write_bytes(b"half")
    load_state(folder, state)
    assert state.epoch == 1
    for epoch in range(1, 4):
        save_state(folder, state, epoch)
    assert folder.names("checkpoints") == ["epoch_0002", "epoch_0003"]


def test_the_newest_state_is_kept_and_loaded_after_ten_thousand_epochs(tmp_path):
    folder, state = Folder(tmp_path), fresh(0)
    for epoch in (9_998, 9_999, 10_000):
        save_state(folder, state, epoch)
    load_state(folder, state)
    assert state.epoch == 10_001


def test_remaining_epochs_count_on():
    state = fresh(0)
    state.epoch = 3
    seen = [(epoch, state.epoch) for epoch in state.remaining(6)]
    assert seen == [(3, 3), (4, 4), (5, 5)] and state.epoch == 6
    assert list(state.remaining(6)) == []


FULL_DISK = """
import resource, sys
sys.path.insert(0, sys.argv[2])
import test_checkpoint as t
t.torch.set_num_threads(1)
folder, state = t.Folder(sys.argv[1]), t.fresh(0)
t.save_state(folder, state, 0)
t.step(state, 1)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))  # from here on no file grows beyond 4 KiB
try:
    t.save_state(folder, state, 1)
except Exception as error:
    print(type(error).__name__, error)
"""


def test_a_full_disk_costs_the_new_checkpoint_only(tmp_path):
    here = str(__file__).rpartition("/")[0]
    done = subprocess.run([sys.executable, "-c", FULL_DISK, str(tmp_path), here], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("RunError") and "epoch_0001/state.pt could not be written" in done.stdout
    assert "free some space" in done.stdout
    state = fresh(9)
    load_state(Folder(tmp_path), state)
    assert state.epoch == 1
    assert same(state.model.state_dict(), fresh(0).model.state_dict())
    assert not list(tmp_path.rglob("*.part"))


# --- the hash of the weights --------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_any_single_bit_changes_the_hash(data):
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    before = weights_hash(module)
    name, tensor = data.draw(st.sampled_from(list(module.state_dict().items())))
    flat = tensor.view(-1).view(torch.uint8)
    place, bit = data.draw(st.integers(0, len(flat) - 1)), data.draw(st.integers(0, 7))
    flat[place] ^= 1 << bit
    assert weights_hash(module) != before, name
    flat[place] ^= 1 << bit
    assert weights_hash(module) == before


def test_layout_and_gradients_leave_the_hash_alone():
    backbone = build_backbone(MODEL, 0)
    before = weights_hash(backbone)
    backbone.eval()(torch.zeros(1, 3, 16, 16)).sum().backward()
    assert weights_hash(backbone.to(memory_format=torch.channels_last)) == before
    assert weights_hash(build_backbone(MODEL, 1)) != before


# --- assignments --------------------------------------------------------------------------------------------------------


def assignment(epoch: int = 3, num: int = 50) -> Assignment:
    rng = np.random.default_rng(epoch)
    labels = rng.integers(-1, 6, num).astype(np.int32)
    distances = rng.random(num).astype(np.float32)
    return Assignment(epoch, labels, distances, rng.random((6, 4)).astype(np.float32), 12.25, "abc")


def test_an_assignment_comes_back_bit_for_bit(tmp_path):
    folder, ours = Folder(tmp_path), assignment()
    save_assignment(folder, ours)
    for stamp in ("abc", None):
        theirs = load_assignment(folder, 3, stamp)
        for name in ("pseudo_labels", "distances", "centroids"):
            mine, back = getattr(ours, name), getattr(theirs, name)
            assert back.dtype == mine.dtype and np.array_equal(back, mine), name
        assert (theirs.epoch, theirs.objective, theirs.weights_hash) == (3, 12.25, "abc")


def test_an_assignment_of_other_weights_or_another_epoch_is_none(tmp_path):
    folder = Folder(tmp_path)
    save_assignment(folder, assignment())
    assert load_assignment(folder, 3, "other") is None
    assert load_assignment(folder, 2, "abc") is None


def test_an_assignment_is_plain_parquet(tmp_path):
    save_assignment(Folder(tmp_path), assignment())
    table = pq.read_table(tmp_path / "assignments" / "epoch_0003.parquet")
    assert table.column_names == ["image_id", "cluster", "distance"]
    assert table["image_id"].to_pylist() == list(range(50))
    assert np.array_equal(table["cluster"].to_numpy(), assignment().pseudo_labels)


def test_of_a_large_set_only_the_last_assignments_stay(tmp_path, monkeypatch):
    folder = Folder(tmp_path)
    for epoch in range(8):
        save_assignment(folder, assignment(epoch))
    assert len(folder.names("assignments")) == 16, "of a small set all stay"
    monkeypatch.setattr(checkpoint, "KEEP_ALL_ASSIGNMENTS", 49)
    save_assignment(folder, assignment(8))
    kept = [f"epoch_{epoch:04d}" for epoch in range(4, 9)]
    assert folder.names("assignments") == sorted(
        f"{one}.{end}" for one in kept for end in ("centroids.safetensors", "parquet")
    )


# --- the backbone -------------------------------------------------------------------------------------------------------


def test_the_backbone_is_plain_safetensors_and_says_what_it_is(tmp_path):
    backbone = build_backbone(MODEL, 5)
    save_backbone(Folder(tmp_path), backbone, CONFIG)
    file = tmp_path / "backbone.safetensors"
    assert same(safetensors.torch.load_file(file), backbone.state_dict())
    with safetensors.safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    assert json.loads(metadata["model"])["architecture"] == "resnet10"
    assert (metadata["input_size"], metadata["resize"], metadata["feature_dim"]) == ("16", "20", "32")


def test_a_backbone_comes_back_as_the_same_function(tmp_path):
    ours = build_backbone(MODEL, 5).eval()
    save_backbone(Folder(tmp_path), ours, CONFIG)
    theirs, metadata = load_backbone(Folder(tmp_path))
    pixels = torch.arange(2 * 3 * 16 * 16).reshape(2, 3, 16, 16) % 256
    assert torch.equal(theirs.eval()(pixels), ours(pixels))
    assert metadata["recipe"] == "tiny"


def test_a_loaded_backbone_gives_an_image_the_same_features_in_any_batch(tmp_path):
    """So it comes in eval mode; in train mode BatchNorm would mix the images of a batch."""
    config = RECIPES["digits"]()
    checkpoint.save_backbone(Folder(tmp_path), build_backbone(config.model, 0), config)
    backbone, _ = checkpoint.load_backbone(Folder(tmp_path))
    pixels = torch.randint(0, 256, (8, 3, 16, 16), generator=torch.Generator().manual_seed(0)).float()
    with torch.no_grad():
        torch.testing.assert_close(backbone(pixels)[:2], backbone(pixels[:2]), rtol=1e-4, atol=1e-4)


def test_a_missing_or_foreign_backbone_is_the_users_error(tmp_path):
    folder = Folder(tmp_path)
    with pytest.raises(UsageError, match=r"holds no backbone.safetensors; give a run directory"):
        load_backbone(folder)
    safetensors.torch.save_file({"fc.weight": torch.zeros(2, 2)}, tmp_path / "timm.safetensors")
    with pytest.raises(UsageError, match=r"timm.safetensors does not say its architecture; give a file that raydc wrote"):
        load_backbone(folder, "timm.safetensors")


@pytest.mark.parametrize(
    "content", [b"", b"abc", b"this is a text file, and no tensors", b"\x80\x02}q\x00X\x05\x00\x00\x00modelq"]
)
def test_what_is_no_safetensors_file_is_the_users_error(tmp_path, content):
    Folder(tmp_path).write("model.pt", content)
    with pytest.raises(UsageError, match=r"model.pt.*give a file that raydc wrote"):
        load_backbone(Folder(tmp_path), "model.pt")


def test_a_truncated_backbone_is_the_users_error(tmp_path):
    folder = Folder(tmp_path)
    save_backbone(folder, build_backbone(MODEL, 5), CONFIG)
    folder.write("short.safetensors", folder.read("backbone.safetensors")[:-100])
    with pytest.raises(UsageError, match=r"short.safetensors"):
        load_backbone(folder, "short.safetensors")
