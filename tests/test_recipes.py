"""Every number of the named runs against its source: protocols.md 1b, calibration.md."""

import pytest

from raydc.models.backbone import build_backbone
from raydc.recipes import RECIPES, in1k_resnet50, in1k_resnet50_sobel

IMAGENET = pytest.mark.parametrize("recipe", [in1k_resnet50, in1k_resnet50_sobel])


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_knows_its_name_and_builds(name):
    config = RECIPES[name]()
    assert config.recipe == name
    assert config == RECIPES[name](), "nothing is drawn or shared"
    assert config.train.weight_decay == 1e-5 and config.train.momentum == 0.9
    assert config.train.balance == "uniform"
    assert config.clustering.whiten and config.clustering.iterations == 20
    assert config.clustering.num_clusters != 10, "k is not the number of classes"


@IMAGENET
def test_imagenets_optimisation_is_protocol_1b2(recipe):
    train = recipe().train
    assert train.batch_size == 64 * 8 == 512
    assert (train.lr, train.schedule, train.schedule_epochs) == (0.1, "constant", 0)
    assert (train.momentum, train.head_momentum, train.weight_decay) == (0.9, 0.0, 1e-5)
    assert train.epochs == 200
    assert (train.plan_length, train.balance) == (1.0, "uniform")
    assert train.clip_norm == 0, "protocol 12: no gradient clip"


@IMAGENET
def test_imagenets_clustering_is_protocol_1b4(recipe):
    clustering = recipe().clustering
    assert (clustering.num_clusters, clustering.pca_dim, clustering.iterations) == (10_000, 256, 20)
    assert clustering.whiten


@IMAGENET
def test_imagenets_augmentation_is_protocol_1b3(recipe):
    images = recipe().images
    assert (images.size, images.resize) == (224, 256)
    assert images.crop_scale == (0.08, 1.0)
    assert images.crop_ratio == (3 / 4, 4 / 3)
    assert images.flip == 0.5
    assert images.rotation == 2.0 and images.warp == "nearest"
    assert (images.brightness, images.contrast, images.saturation, images.hue) == (0.4, 0.4, 1.0, 0.5)
    assert images.grayscale == 0.2
    assert images.colour == "torchvision", "with clamps and in random order, as in the reference"
    assert (images.zoom, images.shear, images.shift, images.elastic) == (0, 0, 0, 0)
    assert images.cache_size == 0


@IMAGENET
def test_imagenets_network_is_protocol_1b1(recipe):
    model = recipe().model
    assert (model.architecture, model.width, model.stem) == ("resnet50", 64, "imagenet")
    assert model.mean == (0.485, 0.456, 0.406) and model.std == (0.229, 0.224, 0.225)


def test_the_two_imagenet_runs_differ_in_sobel_alone():
    from raydc.config import differences

    found = differences(in1k_resnet50(), in1k_resnet50_sobel())
    assert sorted(one.split(" is ")[0] for one in found) == ["model.sobel", "recipe"]
    assert in1k_resnet50_sobel().model.sobel and not in1k_resnet50().model.sobel


def test_cifar10_is_calibrations_network_and_schedule():
    """Rows "Sobel, k=390, fresh head": half width, stride 2, 2.8 M, PCA 128, SGD .05 cosine, batch 256; a schedule
    longer than the run (3/17, 18/26)."""
    config = RECIPES["cifar10_resnet18"]()
    backbone = build_backbone(config.model, 0)
    assert round(sum(p.numel() for p in backbone.parameters()) / 1e6, 1) == 2.8
    assert (config.model.stem, config.model.stem_stride, config.model.sobel) == ("small", 2, True)
    assert backbone.conv1.kernel_size == (3, 3)
    assert (config.images.size, config.images.resize, config.images.colour) == (32, 32, "linear")
    assert config.clustering.num_clusters == 390 == 50_000 // 128
    assert config.clustering.pca_dim == 128
    train = config.train
    assert train.schedule == "cosine" and train.schedule_epochs > train.epochs
    assert (train.lr, train.batch_size, train.plan_length) == (0.05, 256, 1.0)


def test_digits_is_calibrations_network_and_plan():
    """Row "k=100, fresh head, lr .15, 60 steps a round": one block a stage, 128-d features, 16 px, no flips, 10 labels a
    class; 1,437 images need a plan longer than themselves."""
    config = RECIPES["digits"]()
    assert config.model.architecture == "resnet10"
    assert build_backbone(config.model, 0).feature_dim == 128
    assert (config.images.size, config.images.flip) == (16, 0.0)
    for name in ("rotation", "zoom", "shear", "shift", "elastic", "contrast"):
        assert getattr(config.images, name) > 0, name
    assert (config.clustering.num_clusters, config.train.lr) == (100, 0.15)
    steps = config.train.plan_length * 1437 / config.train.batch_size
    assert steps > 30, "at 30 steps a round it learns nothing"
    assert config.probe.images_per_class == 10
    assert config.data == "digits"


def test_nothing_is_cropped_smaller_than_the_network_sees():
    for recipe in RECIPES.values():
        images = recipe().images
        assert images.resize >= images.size
        assert images.cache_size in (0, images.resize), "a cached image is kept at the size its centre is cut from"
