"""A plain DeepCluster of our own, as one would write it from the paper (section 3, protocol 1a): lists of Python numbers,
Pillow, float32.

The rival of bookkeeping.py and end_to_end.py. It is written for clarity, as most code of its time was, and does nothing slow
on purpose.
"""

from __future__ import annotations

import faiss
import numpy as np
import torch
import torch.nn.functional as F
import torchvision.transforms as T
from PIL import Image
from sklearn.metrics import normalized_mutual_info_score
from torch import nn
from torch.utils.data import DataLoader, Dataset


def cluster_lists(labels: list[int], k: int) -> list[list[int]]:
    """The images of each cluster."""
    lists: list[list[int]] = [[] for _ in range(k)]
    for image, label in enumerate(labels):
        lists[label].append(image)
    return lists


def pseudo_labelled(lists: list[list[int]], paths: list[str]) -> list[tuple[str, int]]:
    """(path, pseudo-label) of every image, labels without gaps: the data set of the next epoch."""
    filled = [images for images in lists if images]
    return [(paths[image], label) for label, images in enumerate(filled) for image in images]


def labels_of(lists: list[list[int]]) -> np.ndarray:
    """The label of each image, from what is kept of an epoch."""
    labels = [0] * sum(len(images) for images in lists)
    for label, images in enumerate(lists):
        for image in images:
            labels[image] = label
    return np.array(labels)


def uniform_indices(lists: list[list[int]], length: int, random: np.random.RandomState) -> list[int]:
    """An epoch's draws, equally many of each cluster that has images, in random order."""
    filled = [images for images in lists if images]
    each = length // len(filled) + 1
    draws = [random.choice(images, each, replace=len(images) < each) for images in filled]
    indices = np.concatenate(draws)
    random.shuffle(indices)
    return indices[:length].tolist()


def bookkeeping(labels_N: np.ndarray, previous: list[list[int]], paths: list[str], k: int, length: int, seed: int) -> dict:
    """Everything between two clusterings that has to do with labels, and nothing else; ``previous``: the last lists."""
    lists = cluster_lists(labels_N.tolist(), k)
    dataset = pseudo_labelled(lists, paths)
    indices = uniform_indices(lists, length, np.random.RandomState(seed))
    nmi = normalized_mutual_info_score(labels_of(previous), labels_of(lists))
    return {"sizes": [len(images) for images in lists], "dataset": dataset, "indices": indices, "nmi": nmi}


# --- the whole of it: the rival of end_to_end.py --------------------------------------------------------------------------


class Images(Dataset):
    """(path, label) pairs, decoded by Pillow each time they are asked for."""

    def __init__(self, pairs: list[tuple[str, int]], transform) -> None:
        self.pairs, self.transform = pairs, transform

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int):
        path, label = self.pairs[index]
        return self.transform(Image.open(path).convert("RGB")), label


def central(size: int):
    normalise = T.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    return T.Compose([T.Resize(size), T.CenterCrop(size), T.ToTensor(), normalise])


def random_crops(size: int):
    normalise = T.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    return T.Compose([T.RandomResizedCrop(size), T.RandomHorizontalFlip(), T.ToTensor(), normalise])


@torch.no_grad()
def features_of(backbone: nn.Module, paths: list[str], size: int, batch: int) -> np.ndarray:
    """What the backbone (of normalised pixels) makes of the images, before its last ReLU."""
    backbone.eval()
    loader = DataLoader(Images([(path, 0) for path in paths], central(size)), batch, num_workers=2)
    return np.concatenate([backbone(pixels).numpy() for pixels, _ in loader])


def whitened(features: np.ndarray, dim: int) -> np.ndarray:
    matrix = faiss.PCAMatrix(features.shape[1], dim, -0.5)
    matrix.train(features)
    features = matrix.apply_py(features)
    return features / np.linalg.norm(features, axis=1, keepdims=True)


def clusters(features: np.ndarray, k: int, seed: int) -> np.ndarray:
    clustering = faiss.Clustering(features.shape[1], k)
    clustering.niter, clustering.max_points_per_centroid, clustering.seed = 20, 10_000_000, seed
    index = faiss.IndexFlatL2(features.shape[1])
    clustering.train(features, index)
    return index.search(features, 1)[1][:, 0]


def deepcluster(backbone: nn.Module, paths: list[str], *, size, k, dim, batch, lr, epochs: int, seed: int) -> None:
    """Trains the backbone in place, in float32; ``epochs`` rounds of extract, cluster, reassign, train."""
    random = np.random.RandomState(seed)
    torch.manual_seed(seed)
    optimizer = torch.optim.SGD(backbone.parameters(), lr, momentum=0.9, weight_decay=1e-5)
    for _ in range(epochs):
        features = whitened(features_of(backbone, paths, size, batch), dim)
        lists = cluster_lists(clusters(features, k, random.randint(1234)).tolist(), k)
        top = nn.Linear(backbone.feature_dim, k)
        nn.init.normal_(top.weight, 0, 0.01)
        nn.init.zeros_(top.bias)
        own = torch.optim.SGD(top.parameters(), lr, weight_decay=1e-5)
        label_of = dict(pseudo_labelled(lists, paths))
        draws = uniform_indices(lists, len(paths) // batch * batch, random)
        data = Images([(paths[image], label_of[paths[image]]) for image in draws], random_crops(size))
        backbone.train()
        for pixels, labels in DataLoader(data, batch, num_workers=2):
            loss = F.cross_entropy(top(F.relu(backbone(pixels))), labels)
            for one in (optimizer, own):
                one.zero_grad()
            loss.backward()
            for one in (optimizer, own):
                one.step()
