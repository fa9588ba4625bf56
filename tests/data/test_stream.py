"""What data tasks make of a plan, without Ray: the functions they run, block by block."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pyarrow as pa
import pytest

from raydc.clustering.sampling import SamplingPlan, uniform_plan
from raydc.config import RunError
from raydc.data import shards
from raydc.data.draws import PlanBoard, draw_rows, own_counts, plan_travel
from raydc.data.rows import HEAD_ROWS, RowIndex, head_rows, index_rows, plan_heads, read_rows
from raydc.data.stream import mixed
from raydc.remote import Remote, Shared
from raydc.storage import Folder

NUM, K, BATCH = 50_000, 390, 256


def five_percent_singletons() -> np.ndarray:
    """20 of 390 clusters hold one image each, the others share the rest."""
    labels = 20 + np.arange(NUM) % (K - 20)
    labels[:20] = np.arange(20)
    return np.random.default_rng(0).permutation(labels).astype(np.int32)


def image_of(image_id: int) -> bytes:
    return b"image %d" % image_id


def streamed(plan: SamplingPlan, epoch: int, batch_size: int, rows_per_block: int = 1000, heads=()) -> list[list[tuple]]:
    """Batches as one worker sees them, rows read in a random order of blocks; without the ``heads``."""
    plans = Remote(PlanBoard, local=True)
    travel = plan_travel(plan, batch_size, epoch, lambda ids: [image_of(i) for i in ids], heads)
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


@pytest.fixture(scope="module")
def digits(digits_shards) -> tuple[Folder, RowIndex, dict[int, bytes]]:
    """The shards, where their training rows are, and the encoded image of each image_id."""
    folder = Folder(digits_shards)
    manifest = shards.open_manifest(folder)
    table = shards.read_columns(folder, manifest, "train", ["image_id", "image"])
    by_id = dict(zip(table["image_id"].to_pylist(), table["image"].to_pylist(), strict=True))
    return folder, index_rows(folder, manifest, "train"), by_id


def test_rows_are_read_again_by_image_id(digits):
    folder, index, by_id = digits
    ids = np.array([700, 3, 1200, 4])
    assert read_rows(folder, index, ids) == [by_id[i] for i in ids.tolist()]


def an_index(num: int, num_groups: int) -> RowIndex:
    """Rows in a random order, in groups of unequal sizes."""
    random = np.random.default_rng(1)
    ids = random.permutation(num).astype(np.int32)
    ends = np.append(np.sort(random.choice(np.arange(1, num), num_groups - 1, replace=False)), num)
    return RowIndex([], ids, np.argsort(ids).astype(np.int32), ends, np.zeros(num_groups, np.int32), np.arange(num_groups))


@pytest.mark.parametrize("world_size", [1, 4])
def test_the_heads_and_the_stream_give_every_draw_once_and_every_rank_as_many(world_size):
    """Also of images whose draws are parted between the two."""
    drawn, part = np.random.default_rng(0).integers(0, 4, NUM).astype(np.int32), BATCH // world_size
    drawn[:3] = 100  # drawn often
    drawn[np.flatnonzero(drawn == 3)[: drawn.sum() % BATCH]] = 2
    plan = SamplingPlan(drawn, seed=3)
    counts = own_counts(plan, BATCH)
    heads = plan_heads(counts, an_index(NUM, 800), world_size, part, seed=7)
    taken = [int(head.draws.sum()) for head in heads]
    assert len(set(taken)) == 1 and taken[0] % part == 0 and 0.5 * HEAD_ROWS < sum(taken) <= plan.num_draws / 4
    assert any(((head.draws > 0) & (head.draws < counts[head.image_ids])).any() for head in heads), "an image is parted"
    assert len(np.unique(np.concatenate([head.image_ids for head in heads]))) == sum(len(head.image_ids) for head in heads)
    ids = np.concatenate([np.repeat(head.image_ids, head.draws) for head in heads])
    first = np.concatenate([np.repeat(counts[head.image_ids] - head.draws, head.draws) for head in heads])
    within = np.concatenate([np.arange(n) for head in heads for n in head.draws.tolist()])
    left = [(image_id, draw) for batch in streamed(plan, 1, BATCH, heads=heads) for image_id, draw, _ in batch]
    left += zip(ids.tolist(), (first + within).tolist(), strict=True)
    assert sorted(left) == sorted(zip(*(column.tolist() for column in plan.draws()), strict=True))


@pytest.mark.parametrize(("num", "num_groups", "world_size"), [(30, 1, 1), (300, 7, 2), (300, 300, 8)])
def test_a_small_set_has_a_small_head_or_none(num, num_groups, world_size):
    plan = uniform_plan(np.arange(num, dtype=np.int32) % 3, 3, num // 16 * 16, seed=0)
    heads = plan_heads(own_counts(plan, 16), an_index(num, num_groups), world_size, 16 // world_size, seed=0)
    taken = sum(int(head.draws.sum()) for head in heads)
    assert len(heads) == world_size and taken % 16 == 0 and taken <= plan.num_draws / 4
    assert (taken > 0) == (num_groups == 300)


def test_the_rows_of_a_head_are_its_images_own(digits):
    folder, index, by_id = digits
    counts = np.random.default_rng(0).integers(0, 4, len(by_id))
    (head,) = plan_heads(counts, index, 1, 64, seed=2)
    found = [row for part in head_rows(folder, index, head, counts) for row in part.to_pylist()]
    assert len(found) == head.draws.sum() > 0
    assert all(row["image"] == by_id[row["image_id"]] and 0 <= row["draw"] < counts[row["image_id"]] for row in found)


def test_batches_leave_before_the_buffer_is_full_and_are_mixed_later():
    """The first one as soon as two are there; afterwards the buffer grows by a row for each that leaves."""
    taken = iter(range(100_000))
    batches = mixed(((i, 0, b"") for i in taken), 100, 1000, 0)
    ends = []
    for _ in range(30):
        next(batches)
        ends.append(next(taken))  # (the row that is lost here is of no account)
    assert ends[0] == 200 and ends[1] - ends[0] == 201 and ends[-1] - ends[-2] == 101
    assert ends[-1] <= 30 * 100 + 1000 + 30


@pytest.mark.parametrize("batch_size", [32, 64, 96, 256])
def test_few_images_travel_where_all_are_drawn_several_times(batch_size):
    """Also with small batches, of which the share for one image is none: those drawn like most leave with their own row."""
    plan = uniform_plan(five_percent_singletons(), K, 2 * NUM // 768 * 768, seed=3)
    own = own_counts(plan, batch_size)
    assert (own < plan.counts).sum() == 20, "the singletons"
