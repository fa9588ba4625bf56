"""Lloyd's iterations on integers of 8 bits: most of the cost is the scores of N images with k centroids, and such integers
are multiplied several times as fast as floats. The last assignment is float32's wherever the integers leave a doubt.

That doubt takes the rounding errors of a row's d values as independent, which those of features after a PCA are; where
many columns say the same (raw features of low rank) some labels and the objective are worse, and faiss is the engine to
take. Scores are whole numbers, so the labels of an iteration do not hang on the number of threads. An image is compared
again only once the centroids have moved so far that its lead over the second best may be gone (Hamerly 2010).

B rows, N images, d dimensions, k clusters. Points are less their mean: distances stay what they are.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

PLACES = 1024  # centroids that are compared at once: their scores and the place of each share 32 bits
LARGEST, LOWEST = 1 << 20, -(1 << 31)  # of a score; of what holds a score and a place
ROWS = {"cpu": 1024, "cuda": 32768}  # that are compared at once
BLOCK = 4096  # rows that are copied at once: they stay in a core's cache
TINY = 1e-12  # where all values are alike
REACH = 4.0  # standard deviations of a centroid's step, seen from an image, that its lead must outlast
DOUBT = 8.0  # standard deviations of the rounding: a smaller lead is looked at in float32


@dataclass(frozen=True)
class Points:
    """Features (N, d); less ``mean_d`` and times ``scale`` they are ``ints_Nd``, with zeros up to a multiple of eight."""

    features_Nd: torch.Tensor
    mean_d: torch.Tensor
    ints_Nd: torch.Tensor
    scale: float
    longest: float  # the largest length of a row
    squares: float  # sum of all squared lengths


@dataclass(frozen=True)
class Table:
    """Centroids as integers: tiles of (columns (d, <= PLACES), offsets), and ``unit``, what 1 means of a score."""

    tiles: list[tuple[torch.Tensor, torch.Tensor]]
    unit: float
    doubt: int  # a smaller lead may be one of rounding


@contextlib.contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """The setting is the whole process's."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@functools.cache
def has_fast_int8() -> bool:
    """Whether this CPU multiplies integers of 8 bits in hardware (AVX-512 VNNI; those with AMX have it too)."""
    return bool(torch.cpu.get_capabilities().get("avx512_vnni"))


def run(
    features_Nd: np.ndarray,
    k: int,
    start_kd: np.ndarray | None,
    *,
    iterations: int,
    seed: int,
    spherical: bool,
    gpu: bool = False,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, int]:
    """(centroids, labels, squared distances, objectives, number of splits), from ``start_kd`` or images of the seed."""
    device, rng = "cuda" if gpu and torch.cuda.is_available() else "cpu", np.random.default_rng(seed)
    if not features_Nd.flags.writeable:
        features_Nd = features_Nd.copy()  # torch warns of others
    points = quantise(torch.from_numpy(features_Nd).to(device))
    if start_kd is None:
        start_kd = features_Nd[rng.choice(len(features_Nd), k, replace=False)]
    found = Clusters(points, torch.from_numpy(start_kd).to(device) - points.mean_d, spherical, rng)
    found.run(iterations)
    labels_N = nearest_exact(points, found.centroids_kd)
    centroids_kd = found.centroids_kd + points.mean_d
    parts = zip(points.features_Nd.split(BLOCK), labels_N.split(BLOCK), strict=True)
    distances_N = torch.cat([(rows - centroids_kd[labels]).square_().sum(1) for rows, labels in parts])
    arrays = (one.cpu().numpy() for one in (centroids_kd, labels_N.int(), distances_N))
    return *arrays, np.array(found.objectives), found.num_split


def quantise(features_Nd: torch.Tensor) -> Points:
    """The largest value becomes 127. The mean is that of some rows: any point near the middle does."""
    (num, dim), device = features_Nd.shape, features_Nd.device
    mean_d = features_Nd[:: -(-num // 16384)].mean(0)
    reach = torch.maximum(features_Nd.amax(0) - mean_d, mean_d - features_Nd.amin(0)).max()
    scale = 127 / max(float(reach), TINY)
    ints_Nd = torch.zeros(num, -(-dim // 8) * 8, dtype=torch.int8, device=device)
    lengths_N = torch.empty(num, device=device)
    for at in range(0, num, BLOCK):
        rows = features_Nd[at : at + BLOCK] - mean_d
        lengths_N[at : at + BLOCK] = torch.linalg.vecdot(rows, rows)
        ints_Nd[at : at + BLOCK, :dim] = rows.mul_(scale).round_()
    longest, squares = float(lengths_N.max()) ** 0.5, float(lengths_N.sum(dtype=torch.float64))
    return Points(features_Nd, mean_d, ints_Nd, scale, longest, squares)


class Clusters:
    """Centroids (k, d), less the points' mean, and what is kept from one iteration to the next."""

    def __init__(self, points: Points, centroids_kd: torch.Tensor, spherical: bool, rng: np.random.Generator) -> None:
        self.points, self.spherical, self.rng = points, spherical, rng
        self.centroids_kd = _on_sphere(centroids_kd, points.mean_d) if spherical else centroids_kd
        num, device = len(points.ints_Nd), centroids_kd.device
        self.labels_N = torch.full((num,), -1, device=device)
        self.leads_N = torch.full((num,), -1.0, device=device)  # of scores, less what they may have lost since
        self.sums_kd = torch.zeros_like(centroids_kd, dtype=torch.float64)
        self.sizes_k = torch.zeros(len(centroids_kd), dtype=torch.int64, device=device)
        self.objectives: list[float] = []
        self.num_split = 0

    def run(self, iterations: int) -> None:
        """Ends early where no label changes."""
        for _ in range(iterations):
            if not self._assign():
                break
            self._update()

    def _assign(self) -> int:
        """New labels for those whose lead may be gone, and the sums of the clusters; the number of changes."""
        k, table = len(self.centroids_kd), tabulate(self.points, self.centroids_kd)
        rows = (self.leads_N < 0).nonzero()[:, 0]
        labels, leads = nearest(self.points.ints_Nd, rows, table)
        self.leads_N[rows] = leads * table.unit
        moved = labels != self.labels_N[rows]
        rows, labels = rows[moved], labels[moved]
        self.sums_kd += sums_of(self.points, rows, labels, k) - sums_of(self.points, rows, self.labels_N[rows], k)
        self.labels_N[rows] = labels
        self.sizes_k = torch.bincount(self.labels_N, minlength=k)
        self.objectives.append(self._objective())
        return len(rows)

    def _update(self) -> None:
        before, sizes_k1 = self.centroids_kd, self.sizes_k[:, None]
        self.centroids_kd = torch.where(sizes_k1 > 0, (self.sums_kd / sizes_k1).float(), before)
        halved = self._split()
        if self.spherical:
            self.centroids_kd = _on_sphere(self.centroids_kd, self.points.mean_d)
        self.leads_N -= losses(before, self.centroids_kd, self.points.longest)[self.labels_N]
        self.leads_N[torch.isin(self.labels_N, torch.tensor(halved, device=before.device))] = -1
        self.num_split += len(halved)

    def _split(self) -> list[int]:
        """The largest cluster and an empty one part along the line to one of its images; those that were parted."""
        sizes, halved = self.sizes_k.cpu().numpy().copy(), []
        for empty in np.flatnonzero(sizes == 0).tolist():
            largest = int(sizes.argmax())
            if sizes[largest] < 2:
                break
            members = (self.labels_N == largest).nonzero()[:, 0]
            image = self.points.features_Nd[members[self.rng.integers(len(members))]] - self.points.mean_d
            step = (image - self.centroids_kd[largest]) / 8  # longer than what 8 bits resolve
            self.centroids_kd[empty] = self.centroids_kd[largest] + step
            self.centroids_kd[largest] -= step
            sizes[empty], sizes[largest] = 1, sizes[largest] - sizes[largest] // 2
            halved.append(largest)
        return halved

    def _objective(self) -> float:
        """Sum of the squared distances, from the sums alone."""
        centroids_kd = self.centroids_kd.double()
        own = (self.sizes_k * centroids_kd.square().sum(1)).sum() - 2 * (centroids_kd * self.sums_kd).sum()
        return max(0.0, self.points.squares + float(own))


def tabulate(points: Points, centroids_kd: torch.Tensor) -> Table:
    """A score is x.c - |c|^2 / 2, half the squared distance less what does not hang on c; for lengths of one the cosine.

    Rounding errors of x and c are as good as independent and uniform: a variance of 1/12 each.
    """
    dim, width = points.features_Nd.shape[1], points.ints_Nd.shape[1]
    squares_k = centroids_kd.square().sum(1)
    most = float(squares_k.max())
    finest = 127 / max(float(centroids_kd.abs().max()), TINY)
    bound = points.scale * (points.longest * most**0.5 + most / 2)
    scale = min(finest, 0.9 * LARGEST / max(bound, TINY))
    unit = 1 / (points.scale * scale)
    ints_kd = F.pad((centroids_kd * scale).round_(), (0, width - dim)).to(torch.int8)
    offsets_k = (squares_k / (-2 * unit)).round_().int()
    error = (4 * most / points.scale**2 + 2 * points.longest**2 / scale**2) / 12
    tiles = []
    for ints, offsets in zip(ints_kd.split(PLACES), offsets_k.split(PLACES), strict=True):
        empty = -len(ints) % 8
        places = torch.arange(PLACES - 1, PLACES - 1 - len(ints), -1, device=ints.device, dtype=torch.int32)
        tiles.append((F.pad(ints, (0, 0, 0, empty)).t(), F.pad(offsets * PLACES + places, (0, empty), value=LOWEST)))
    return Table(tiles, unit, 2 + int(DOUBT * error**0.5 / unit))


def nearest(ints_Nd: torch.Tensor, rows: torch.Tensor, table: Table) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the rows: (the centroid of the best score, of several the first; by how much it leads, int32)."""
    whole = len(rows) == len(ints_Nd)
    labels, leads = torch.empty_like(rows), torch.empty(len(rows), dtype=torch.int32, device=rows.device)
    step = ROWS[rows.device.type] * (1 if len(table.tiles) > 1 else PLACES // table.tiles[0][0].shape[1])
    for at in range(0, len(rows), step):
        part = ints_Nd[at : at + step] if whole else ints_Nd.index_select(0, rows[at : at + step])
        labels[at : at + step], leads[at : at + step] = _best(part, table)
    return labels, leads


def _best(ints_Bd: torch.Tensor, table: Table) -> tuple[torch.Tensor, torch.Tensor]:
    label = best = second = None
    for number, (columns, offsets) in enumerate(table.tiles):
        scores = _products(ints_Bd, columns).mul_(PLACES).add_(offsets)
        first = scores.amax(1, keepdim=True)
        place = (PLACES - 1 - (first & (PLACES - 1))).long()
        runner_up = scores.scatter_(1, place, LOWEST).amax(1) >> 10
        first, place = first[:, 0] >> 10, place[:, 0] + number * PLACES
        if label is None:
            label, best, second = place, first, runner_up
            continue
        better = first > best
        second = torch.maximum(torch.where(better, runner_up, second), torch.minimum(first, best))
        label, best = torch.where(better, place, label), torch.maximum(first, best)
    return label, best - second


def _products(ints_Bd: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """int32; where the CPU would multiply them one by one, through floats, which hold such numbers exactly."""
    if ints_Bd.is_cuda and len(ints_Bd) < 32:  # a GPU takes no fewer than 17
        return torch._int_mm(F.pad(ints_Bd, (0, 0, 0, 32 - len(ints_Bd))), columns)[: len(ints_Bd)]
    if ints_Bd.is_cuda or has_fast_int8():
        return torch._int_mm(ints_Bd, columns)
    return (ints_Bd.float() @ columns.float()).int()


def sums_of(points: Points, rows: torch.Tensor, labels: torch.Tensor, k: int) -> torch.Tensor:
    """float64 (k, d): sum of each cluster's rows, less the mean of all; those of label -1 are left out."""
    rows, labels = rows[labels >= 0], labels[labels >= 0]
    sums = torch.zeros(k, points.features_Nd.shape[1], dtype=torch.float64, device=rows.device)
    for some, of in zip(rows.split(4 * BLOCK), labels.split(4 * BLOCK), strict=True):
        sizes = torch.bincount(of, minlength=k)
        order = some[torch.argsort(of, stable=True)]
        sums += F.embedding_bag(order, points.features_Nd, sizes.cumsum(0) - sizes, mode="sum")
        sums -= sizes[:, None] * points.mean_d.double()
    return sums


def nearest_exact(points: Points, centroids_kd: torch.Tensor) -> torch.Tensor:
    """int64 (N,): as float32 has it, which is asked where the integers leave a doubt."""
    table = tabulate(points, centroids_kd)
    everyone = torch.arange(len(points.ints_Nd), device=points.ints_Nd.device)
    labels_N, leads_N = nearest(points.ints_Nd, everyone, table)
    offsets_k = centroids_kd.square().sum(1) / -2
    doubtful = (leads_N <= table.doubt).nonzero()[:, 0]
    for rows in doubtful.split(ROWS[doubtful.device.type]):
        scores = torch.addmm(offsets_k, points.features_Nd[rows] - points.mean_d, centroids_kd.t())
        labels_N[rows] = scores.argmax(1)
    return labels_N


def losses(before_kd: torch.Tensor, after_kd: torch.Tensor, longest: float) -> torch.Tensor:
    """(k,): what the step of the centroids may cost the images of each cluster of their lead.

    The score of x moves by x.step, at most |x||step|; of d directions the step lies as good as any to x's, so that REACH
    times |x||step| / sqrt(d) is rarely passed. Of the other centroids the step of nearly all counts, not the longest.
    """
    share = min(1.0, REACH / before_kd.shape[1] ** 0.5)
    steps_k = share * longest * (after_kd - before_kd).norm(dim=1)
    falls_k = (after_kd.square().sum(1) - before_kd.square().sum(1)) / 2
    others = (steps_k - falls_k).float().quantile(0.9)
    return steps_k + falls_k + others


def _on_sphere(centroids_kd: torch.Tensor, mean_d: torch.Tensor) -> torch.Tensor:
    return F.normalize(centroids_kd + mean_d, dim=1) - mean_d
