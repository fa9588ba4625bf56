"""Several crops of an image: how they are cut, kept together and cut into pieces; on real images."""

import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as TF
from PIL import Image

from raydc.clustering.sampling import SamplingPlan
from raydc.config import ClusteringConfig, Config, ImagesConfig, TrainConfig, V2Config
from raydc.data.cache import CachedImages, Crops, ImageArray, cut, decoders
from raydc.deepcluster_v2 import num_views, views_of
from raydc.recipes import in1k_resnet50_dcv2, in1k_resnet50_dcv2_800

pytestmark = pytest.mark.usefixtures("one_thread")

# A crop of all there is, so that what comes out is torchvision's resize.
WHOLE = ImagesConfig(size=32, resize=32, crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), flip=0.0)
RANDOM = ImagesConfig(size=32, resize=32, brightness=0.4, blur=0.5)


@pytest.fixture(scope="module")
def cifar(real_data) -> np.ndarray:
    """20 real images, uint8 (20, 32, 32, 3)."""
    files = sorted((real_data / "cifar10" / "test").rglob("*.jpg"))[::250]
    return np.stack([np.asarray(Image.open(file).convert("RGB")) for file in files])


def cached(images: np.ndarray, rank: int = 0, world_size: int = 1) -> CachedImages:
    num, height, width, _ = images.shape
    sizes = np.full(num, height), np.full(num, width)
    array = ImageArray(images.ravel(), np.arange(num) * height * width * 3, *sizes)
    return CachedImages({"train": array}, RANDOM, rank=rank, world_size=world_size, device="cpu", threads=1)


def plan(num: int) -> SamplingPlan:
    return SamplingPlan(np.ones(num, np.int32), seed=3)


def sized(config: ImagesConfig, size: int) -> ImagesConfig:
    return replace(config, size=size)


# --- Crops --------------------------------------------------------------------------------------------------------------


def test_a_slice_cuts_every_crop():
    crops = Crops([torch.arange(5), torch.arange(10, 15), torch.arange(20, 25)])
    piece = crops[1:3]
    assert isinstance(piece, Crops)
    assert [crop.tolist() for crop in piece] == [[1, 2], [11, 12], [21, 22]]
    assert [crop.tolist() for crop in piece[1:]] == [[2], [12], [22]], "again and again"
    assert [crop.tolist() for crop in crops[torch.tensor([4, 0])]] == [[4, 0], [14, 10], [24, 20]]


def test_what_is_iterated_is_whole_crops():
    crops = Crops([torch.arange(5), torch.arange(10, 15)])
    assert len(crops) == 2
    assert [len(crop) for crop in crops] == [5, 5]
    first, second = crops
    assert (first[0], second[0]) == (0, 10)


def test_crops_travel_between_processes():
    crops = Crops([torch.arange(5), torch.arange(10, 15)])
    back = pickle.loads(pickle.dumps(crops))
    assert isinstance(back, Crops)
    assert all(torch.equal(one, other) for one, other in zip(back, crops, strict=True))


# --- how they are cut ---------------------------------------------------------------------------------------------------


def test_each_crop_is_cut_at_its_own_size(cifar):
    views = [WHOLE, sized(WHOLE, 24), sized(WHOLE, 16)]
    (ids, crops), *rest = cached(cifar).train(plan(20), 0, 20, views)
    assert not rest and sorted(ids) == list(range(20))
    assert [tuple(crop.shape) for crop in crops] == [(20, 3, 32, 32), (20, 3, 24, 24), (20, 3, 16, 16)]
    images = torch.from_numpy(cifar[ids]).permute(0, 3, 1, 2).float()
    largest, *smaller = crops
    assert torch.equal(largest, images)
    for crop in smaller:
        theirs = TF.resize(images, [crop.shape[2]] * 2, antialias=True)
        assert (crop - theirs).abs().max() < 0.1


def test_crops_of_an_image_differ_from_each_other(cifar):
    (_, crops), *_ = cached(cifar).train(plan(20), 0, 20, [RANDOM, RANDOM, RANDOM])
    crops = list(crops)
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert (crops[one] - crops[other]).abs().mean((1, 2, 3)).min() > 0.5, "of every image"


def test_a_crop_does_not_hang_on_the_crops_behind_it(cifar):
    """Crop 0 of two is crop 0 of three."""
    views = [sized(RANDOM, 24), sized(RANDOM, 16), sized(RANDOM, 16)]
    (_, three), *_ = cached(cifar).train(plan(20), 5, 20, views)
    (_, two), *_ = cached(cifar).train(plan(20), 5, 20, views[:2])
    assert all(torch.equal(one, other) for one, other in zip(two, three, strict=False))
    (_, later), *_ = cached(cifar).train(plan(20), 6, 20, views[:2])
    assert not any(torch.equal(one, other) for one, other in zip(two, later, strict=True)), "another epoch's are others"


def test_two_workers_cut_the_crops_that_one_cuts(cifar):
    """Rank r has its slice of every global batch, of every crop. No blur: its kernel has the batch in it."""
    views = [sized(replace(RANDOM, blur=0.0), size) for size in (24, 16)]
    whole = list(cached(cifar).train(plan(20), 0, 10, views))
    parts = [list(cached(cifar, rank, 2).train(plan(20), 0, 10, views)) for rank in (0, 1)]
    assert len(whole) == len(parts[0]) == len(parts[1]) == 2
    for (ids, crops), *pieces in zip(whole, *parts, strict=True):
        assert ids.tolist() == [n for mine, _ in pieces for n in mine]
        for view, crop in enumerate(crops):
            assert torch.allclose(crop, torch.cat([list(mine)[view] for _, mine in pieces]), atol=1e-3)


def test_without_views_there_is_one_crop_as_ever(cifar):
    (ids, pixels), *_ = cached(cifar).train(plan(20), 0, 20)
    assert isinstance(pixels, torch.Tensor) and pixels.shape == (20, 3, 32, 32)
    assert len(ids) == 20


def test_a_list_of_one_view_gives_a_list_of_one_crop(cifar):
    """DeepCluster-v2 on one GPU has one crop (protocol 1c: 1x224); its loop goes over crops, not over images."""
    (_, crops), *_ = cached(cifar).train(plan(20), 0, 20, [WHOLE])
    assert [tuple(crop.shape) for crop in crops] == [(20, 3, 32, 32)]


# --- which they are -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        (in1k_resnet50_dcv2, [(160, (0.08, 1.0))] * 2 + [(96, (0.05, 0.14))] * 4),
        (in1k_resnet50_dcv2_800, [(224, (0.14, 1.0))] * 2 + [(96, (0.05, 0.14))] * 6),
    ],
)
def test_the_views_are_protocol_1cs(recipe, expected):
    """2x160 (.08-1) + 4x96 (.05-.14); 2x224 (.14-1) + 6x96 (.05-.14)."""
    views = views_of(recipe())
    assert [(view.size, view.crop_scale) for view in views] == expected
    for view in views:
        assert replace(view, size=224, crop_scale=(0.08, 1.0)) == recipe().images, "all else is alike"


def v2(**values) -> Config:
    return Config(
        algorithm="deepcluster_v2",
        clustering=ClusteringConfig(num_clusters=7, pca_dim=0, whiten=False, method="spherical", features="remembered"),
        train=TrainConfig(head="centroids", balance="none"),
        v2=V2Config(**values),
    )


@pytest.mark.parametrize(
    ("num_crops", "sizes", "remembered"),
    [((1,), [160], 1), ((2,), [160, 160], 2), ((1, 3), [160, 96, 96, 96], 2), ((0, 2), [96, 96], 2), ((0, 1), [96], 1)],
)
def test_two_crops_are_remembered_where_there_are_two(num_crops, sizes, remembered):
    """Protocol 1c: crops_for_assign 0 and 1, or 0 where there is one crop."""
    num = len(num_crops)
    config = v2(num_crops=num_crops, crop_sizes=(160, 96)[:num], min_scales=(0.08, 0.05)[:num], max_scales=(1.0, 0.14)[:num])
    assert [view.size for view in views_of(config)] == sizes
    assert num_views(config) == remembered


def test_a_decoding_thread_keeps_to_one_cpu_whatever_torch_is_told():
    """Also after its first operation of torch, which sets up the thread with the process's number."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with decoders(2) as pool:
            cut([np.zeros((300, 300, 3), np.uint8)] * 8, np.array([[0, 0, 200, 200]] * 8), None, 224, pool)
            assert list(pool.map(lambda _: torch.get_num_threads(), range(8))) == [1] * 8
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
