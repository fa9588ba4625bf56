"""The draws of a plan as rows of a stream: what data tasks do to a block.

The data processes of a training pass load this room: torch or Ray Train here would cost each of them seconds.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from raydc.clustering.sampling import SamplingPlan, numbered
from raydc.data.rows import Head
from raydc.remote import Remote
from raydc.seeding import derive, uniforms

# Largest share of a global batch that one image may take where its draws leave the stream together; the draws of images
# that are drawn more often travel with other rows, all over the epoch.
TOGETHER = 0.02


class PlanBoard:
    """Which plan the data tasks follow. The driver makes it, so that it outlives a worker group."""

    def __init__(self) -> None:
        self.key, self.refs = "", []

    def publish(self, refs: list) -> None:
        # No counter: a data process may serve another run, or a board that was restarted, and must not take their plan.
        self.key, self.refs = uuid.uuid4().hex, refs

    def current(self) -> tuple[str, list]:
        return self.key, self.refs


@dataclass(frozen=True, eq=False)
class Travel:
    """A plan as data tasks read it. Draws of images drawn often travel with another row, their carrier, picked by hash:
    so they are spread over the epoch in whatever order rows come. A carrier itself need not be drawn.

    counts: int32 (N,), draws that leave with their own row. carriers (sorted), image_ids, draws: the travelling ones.
    hot_ids (sorted), hot_images: the encoded bytes of the images that travel.
    """

    counts: np.ndarray
    carriers: np.ndarray
    image_ids: np.ndarray
    draws: np.ndarray
    hot_ids: np.ndarray
    hot_images: pa.Array
    seed: int


def own_counts(plan: SamplingPlan, batch_size: int) -> np.ndarray:
    """Draws of each image that leave together, none of images that are drawn often (and more often than most)."""
    mean = plan.num_draws // max(1, np.count_nonzero(plan.counts))
    return np.where(plan.counts > max(int(TOGETHER * batch_size), 2 * mean), 0, plan.counts)


def plan_travel(plan: SamplingPlan, batch_size: int, seed: int, hot_images, heads: Sequence[Head] = ()) -> Travel:
    """Split a plan; ``hot_images(ids)`` gives the encoded images of the ids. Draws of the ``heads`` do not travel."""
    counts = own_counts(plan, batch_size)
    hot_ids = np.flatnonzero(plan.counts > counts)
    image_ids = np.repeat(hot_ids, plan.counts[hot_ids])
    draws = numbered(plan.counts[hot_ids])
    carriers = (uniforms(derive(plan.seed, "carrier"), image_ids, draws)[:, 0] * len(plan.counts)).astype(np.int64)
    order = np.argsort(carriers, kind="stable")
    for head in heads:
        counts[head.image_ids] -= head.draws
    encoded = pa.array(hot_images(hot_ids), pa.large_binary())  # Arrow: read in place by every data process of a node
    return Travel(counts, carriers[order], image_ids[order], draws[order], hot_ids, encoded, seed)


_plan: dict = {}  # of this data process: the current plan, fetched once an epoch


def current_travel(plans: Remote) -> Travel:
    key, refs = plans.current()
    if _plan.get("key") != key:
        _plan.update(key=key, travel=refs[0].get())
    return _plan["travel"]


def draw_rows(table: pa.Table, plans: Remote) -> pa.Table:
    """Rows (image_id, image) of a block -> one row (image_id, draw, image) for each draw that leaves here."""
    travel = current_travel(plans)
    ids = table["image_id"].to_numpy()
    counts = travel.counts[ids]
    rows = np.repeat(np.arange(len(ids)), counts)
    own = pa.table(
        {
            "image_id": ids[rows],
            "draw": numbered(counts).astype(np.int64),
            "image": table["image"].take(pa.array(rows)).combine_chunks(),
        }
    )
    start, stop = np.searchsorted(travel.carriers, ids, "left"), np.searchsorted(travel.carriers, ids, "right")
    carried = np.concatenate([np.arange(a, b) for a, b in zip(start, stop, strict=True) if b > a] or [np.empty(0, int)])
    where = np.searchsorted(travel.hot_ids, travel.image_ids[carried])
    guests = pa.table(
        {
            "image_id": travel.image_ids[carried],
            "draw": travel.draws[carried],
            "image": travel.hot_images.take(pa.array(where)),
        }
    )
    return pa.concat_tables([own, guests.cast(own.schema)])
