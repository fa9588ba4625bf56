"""What data tasks make of a plan, without Ray: the functions they run, block by block."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pyarrow as pa
import pytest

from raydc.clustering.sampling import SamplingPlan, uniform_plan
from raydc.config import RunError
from raydc.data import ingest, shards, stream
from raydc.data.stream import PlanBoard, draw_rows, mixed, plan_travel, read_rows
from raydc.launch import Remote, Shared
from raydc.storage import Folder

NUM, K, BATCH = 50_000, 390, 256


def five_percent_singletons() -> np.ndarray:
    """20 of 390 clusters hold one image each, the others share the rest."""
    labels = 20 + np.arange(NUM) % (K - 20)
    labels[:20] = np.arange(20)
    return np.random.default_rng(0).permutation(labels).astype(np.int32)


def image_of(image_id: int) -> bytes:
    return b"image %d" % image_id


def streamed(plan: SamplingPlan, epoch: int, batch_size: int, rows_per_block: int = 1000) -> list[list[tuple]]:
    """Batches as one worker sees them, rows read in a random order of blocks."""
    plans = Remote(PlanBoard, local=True)
    travel = plan_travel(plan, batch_size, epoch, lambda ids: [image_of(i) for i in ids])
    plans.publish([Shared(travel, local=True)])
    order = np.random.default_rng(epoch).permutation(len(plan.counts))

    def rows():
        for start in range(0, len(order), rows_per_block):
            ids = order[start : start + rows_per_block]
            block = draw_rows(pa.table({"image_id": ids, "image": [image_of(i) for i in ids]}), plans)
            yield from zip(*(block[name].to_pylist() for name in ("image_id", "draw", "image")), strict=True)

    return list(mixed(rows(), batch_size, 2048, epoch))


def test_no_image_of_a_tiny_cluster_fills_a_batch():
    plan = uniform_plan(five_percent_singletons(), K, NUM // BATCH * BATCH, seed=3)
    assert plan.counts.max() >= NUM // K - 1  # a cluster of one is drawn as often as any other
    for batch in streamed(plan, 0, BATCH):
        ((_, most),) = Counter(image_id for image_id, _, _ in batch).most_common(1)
        assert most <= 0.03 * BATCH


def test_every_draw_leaves_once_with_its_own_image():
    plan = uniform_plan(five_percent_singletons(), K, NUM // BATCH * BATCH, seed=3)
    batches = streamed(plan, 1, BATCH)
    image_ids, draws = plan.draws()
    left = [(image_id, draw) for batch in batches for image_id, draw, _ in batch]
    assert sorted(left) == sorted(zip(image_ids.tolist(), draws.tolist(), strict=True))
    assert {len(batch) for batch in batches} == {BATCH}
    assert all(image == image_of(image_id) for batch in batches for image_id, _, image in batch)


def test_a_new_board_is_not_taken_for_an_old_one():
    """A data process that served another run, or a board that restarted, must not go on with the plan it has."""
    block = pa.table({"image_id": np.arange(4), "image": [image_of(i) for i in range(4)]})
    for counts in ([1, 0, 0, 1], [0, 1, 1, 0]):
        plans = Remote(PlanBoard, local=True)
        plan = SamplingPlan(np.array(counts, np.int32), 0)
        plans.publish([Shared(plan_travel(plan, 256, 0, lambda ids: [b""] * len(ids)), local=True)])
        assert draw_rows(block, plans)["image_id"].to_pylist() == np.flatnonzero(counts).tolist()


def test_a_stream_that_ends_within_a_batch_is_an_error():
    with pytest.raises(RunError, match="3 draws into a batch"):
        list(mixed(((i, 0, b"") for i in range(11)), 4, 2, 0))


def test_rows_are_read_again_by_image_id(tmp_path):
    ingest.make_shards("digits", str(tmp_path), use_ray=False, progress=False)
    folder = Folder(str(tmp_path))
    manifest = shards.open_manifest(folder)
    table = shards.read_columns(folder, manifest, "train", ["image_id", "image"])
    by_id = dict(zip(table["image_id"].to_pylist(), table["image"].to_pylist(), strict=True))
    ids = np.array([700, 3, 1200, 4])
    assert read_rows(folder, stream._row_index(folder, manifest), ids) == [by_id[i] for i in ids.tolist()]
