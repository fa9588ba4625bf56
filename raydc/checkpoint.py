"""What a run leaves behind and comes back to: the two commit points of an epoch, and the backbone for everyone else.

After cluster, the assignment is committed, stamped with a hash of the weights it came from; after train, model and
optimizer. Files are written beside and renamed, older ones are deleted only then.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.numpy
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import nn

from raydc import config as configs
from raydc.clustering.assignment import Assignment
from raydc.clustering.whitening import Whitening
from raydc.config import ModelConfig, RunError, UsageError
from raydc.models.backbone import Backbone, make_backbone
from raydc.models.head import with_rows
from raydc.storage import Folder

KEEP_STATES = 2
KEEP_ALL_ASSIGNMENTS = 1_000_000  # images; above it only the last KEEP_ASSIGNMENTS stay
KEEP_ASSIGNMENTS = 5
BACKBONE = "backbone.safetensors"


@dataclass
class TrainState:
    """What survives from epoch to epoch. ``epoch`` counts the epochs that are done."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    epoch: int = 0

    def remaining(self, epochs: int) -> Iterator[int]:
        """Epochs still to be trained; counts on as each is done."""
        for epoch in range(self.epoch, epochs):
            yield epoch
            self.epoch = epoch + 1

    def resize_head(self, num_clusters: int) -> None:
        """Another number of clusters (PIC finds its own): rows of weights and momentum are cut off or added."""
        head = self.model.head
        states = [self.optimizer.state.pop(parameter, None) for parameter in head.parameters()]
        head.resize(num_clusters)
        self.optimizer.param_groups[-1]["params"] = list(head.parameters())
        for parameter, state in zip(head.parameters(), states, strict=True):
            if state and state.get("momentum_buffer") is not None:
                state["momentum_buffer"] = with_rows(state["momentum_buffer"], num_clusters)
                self.optimizer.state[parameter] = state


def name(epoch: int) -> str:
    return f"epoch_{epoch:04d}"


def weights_hash(module: nn.Module) -> str:
    """Of every parameter and saved buffer, bit by bit."""
    return tensors_hash(module.state_dict())


def tensors_hash(tensors: Mapping[str, torch.Tensor], facts: str = "") -> str:
    """Of names and values, in the order of the names (files of tensors have none of their own), after ``facts``."""
    digest = hashlib.blake2b(facts.encode(), digest_size=16)
    for key, value in sorted(tensors.items()):
        digest.update(key.encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _write(folder: Folder, path: str, data: bytes) -> None:
    try:
        folder.write(path, data)
    except OSError as error:
        raise RunError(
            f"{folder.uri}/{path} could not be written ({error.strerror or error}); what was committed before is intact: "
            "free some space and give the same command again"
        ) from None


# --- model and optimizer ------------------------------------------------------------------------------------------------


def check_finite(model: nn.Module, epoch: int) -> None:
    """RunError if a weight is not a number: the last update may diverge after the last look at the loss."""
    if not all(bool(value.isfinite().all()) for value in model.state_dict().values()):
        raise RunError(
            f"weights are not finite after epoch {epoch}; the checkpoint before it is kept: lower train.lr (or set "
            "train.clip_norm) and start a new run directory"
        )


def save_state(folder: Folder, state: TrainState, epoch: int) -> None:
    """Commit the end of ``epoch``; ``checkpoints/epoch_0007/state.pt`` loads with ``weights_only=True``."""
    buffer = io.BytesIO()
    values = {"epoch": epoch + 1, "model": state.model.state_dict(), "optimizer": state.optimizer.state_dict()}
    torch.save(values, buffer)
    _write(folder, f"checkpoints/{name(epoch)}/state.pt", buffer.getvalue())
    for old in _states(folder)[:-KEEP_STATES]:
        folder.delete_folder(f"checkpoints/{old}")


def _states(folder: Folder) -> list[str]:
    whole = [one for one in folder.names("checkpoints") if folder.exists(f"checkpoints/{one}/state.pt")]
    return sorted(whole, key=_number)


def _number(epoch_name: str) -> int:
    return int(epoch_name.split("_")[1])


def load_state(folder: Folder, state: TrainState) -> None:
    """Bring ``state`` to the last commit; leaves it alone where there is none."""
    committed = _states(folder)
    if not committed:
        return
    data = folder.read(f"checkpoints/{committed[-1]}/state.pt")
    values = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    if hasattr(getattr(state.model, "head", None), "resize"):  # the benchmarks' models have other heads, or none
        num_clusters = len(values["model"]["head.weight"])
        if num_clusters != state.model.head.out_features:
            state.resize_head(num_clusters)
    state.model.load_state_dict(values["model"])
    state.optimizer.load_state_dict(values["optimizer"])
    state.epoch = values["epoch"]


# --- what is remembered (written by the bank) ---------------------------------------------------------------------------


def memory_file(epoch: int) -> str:
    """Where the bank keeps what it remembers at the end of ``epoch``: beside the state it belongs to."""
    return f"checkpoints/{name(epoch)}/memory.safetensors"


# --- assignments --------------------------------------------------------------------------------------------------------


def _stem(epoch: int, part: int) -> str:
    return f"assignments/{name(epoch)}" + (f"_{part}" if part else "")


def save_assignment(folder: Folder, assignment: Assignment, part: int = 0) -> None:
    """Commit a clustering: image_id, cluster, distance as Parquet; centroids, and what leads to their space, in a file of
    their own, written first. ``part``: which of an epoch's clusterings (DeepCluster-v2 has one a head; write 0 last)."""
    stem = _stem(assignment.epoch, part)
    arrays = {"centroids": assignment.centroids}
    if (whitening := assignment.whitening) is not None:
        arrays |= {"mean": whitening.mean_D, "norm": np.array(whitening.norm)}
        arrays |= {} if whitening.matrix_Dd is None else {"matrix": whitening.matrix_Dd}
    tensors = {key: np.asarray(value, order="C") for key, value in arrays.items()}
    _write(folder, f"{stem}.centroids.safetensors", safetensors.numpy.save(tensors))
    ids = np.arange(len(assignment.pseudo_labels))
    table = pa.table({"image_id": ids, "cluster": assignment.pseudo_labels, "distance": assignment.distances})
    facts = {key: getattr(assignment, key) for key in ("objective", "weights_hash", "epoch", "num_repaired")}
    sink = pa.BufferOutputStream()
    pq.write_table(table.replace_schema_metadata({"raydc": json.dumps(facts)}), sink, compression="zstd")
    _write(folder, f"{stem}.parquet", sink.getvalue())
    if len(ids) > KEEP_ALL_ASSIGNMENTS:
        _forget_assignments(folder)


def _forget_assignments(folder: Folder) -> None:
    stems = {one.split(".")[0] for one in folder.names("assignments") if one.endswith(".parquet")}
    kept = sorted(set(map(_number, stems)))[-KEEP_ASSIGNMENTS:]
    for old in sorted(one for one in stems if _number(one) not in kept):
        folder.delete(f"assignments/{old}.parquet")
        folder.delete(f"assignments/{old}.centroids.safetensors")


def load_assignment(folder: Folder, epoch: int, weights_hash: str | None = None, part: int = 0) -> Assignment | None:
    """The committed clustering of an epoch; None where there is none, or where it came from other weights."""
    stem = _stem(epoch, part)
    if not folder.exists(f"{stem}.parquet"):
        return None
    table = pq.read_table(folder.path(f"{stem}.parquet"), filesystem=folder.fs, partitioning=None)
    facts = json.loads(table.schema.metadata[b"raydc"])
    if weights_hash not in (None, facts["weights_hash"]):
        return None
    order = np.argsort(table["image_id"].to_numpy(), kind="stable")
    tensors = safetensors.numpy.load(folder.read(f"{stem}.centroids.safetensors"))
    whitening = None
    if "mean" in tensors:
        whitening = Whitening(tensors["mean"], tensors.get("matrix"), norm=tensors["norm"].item())
    return Assignment(
        epoch=epoch,
        pseudo_labels=table["cluster"].to_numpy()[order],
        distances=table["distance"].to_numpy()[order],
        centroids=tensors["centroids"],
        objective=facts["objective"],
        weights_hash=facts["weights_hash"],
        whitening=whitening,
        num_repaired=facts.get("num_repaired", 0),
    )


# --- the backbone, for anyone -------------------------------------------------------------------------------------------


def save_backbone(folder: Folder, backbone: Backbone, config: configs.Config) -> None:
    """Weights under torchvision's names; the metadata says everything needed to build the network again."""
    metadata = {
        "format": "raydc backbone 1",
        "model": json.dumps(configs.to_dict(config.model)),
        "input_size": str(config.images.size),
        "resize": str(config.images.resize),
        "feature_dim": str(backbone.feature_dim),
        "recipe": config.recipe,
    }
    tensors = {key: value.detach().cpu().contiguous() for key, value in backbone.state_dict().items()}
    _write(folder, BACKBONE, safetensors.torch.save(tensors, metadata))


def read_tensors(folder: Folder, file: str = BACKBONE) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file; UsageError where it is none."""
    if not folder.exists(file):
        raise UsageError(f"{folder.uri} holds no {file}; give a run directory with a finished epoch")
    data = folder.read(file)
    try:
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        return safetensors.torch.load(data), header.get("__metadata__", {})
    except (ValueError, SafetensorError):
        raise UsageError(f"{folder.uri}/{file} is no safetensors file, or damaged; give a file that raydc wrote") from None


def load_backbone(folder: Folder, file: str = BACKBONE) -> tuple[Backbone, dict[str, str]]:
    """The network of a run directory (or of any such file), in eval mode, and its metadata.

    UsageError if it is not one of ours.
    """
    tensors, metadata = read_tensors(folder, file)
    if "model" not in metadata:
        raise UsageError(f"{folder.uri}/{file} does not say its architecture; give a file that raydc wrote")
    backbone = make_backbone(configs.from_dict(ModelConfig, json.loads(metadata["model"])))
    backbone.load_state_dict(tensors, strict=True)
    return backbone.eval(), metadata
