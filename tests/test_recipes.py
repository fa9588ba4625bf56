"""Every number of the named runs against its source: the reference configurations, calibration.md."""

import math
from pathlib import Path

import pytest

from raydc.config import Config, differences
from raydc.models.backbone import build_backbone
from raydc.optim import learning_rate
from raydc.recipes import (
    RECIPES,
    SOURCES,
    in1k_alexnet_sobel,
    in1k_resnet50,
    in1k_resnet50_dcv2,
    in1k_resnet50_dcv2_800,
    in1k_resnet50_odc,
    in1k_resnet50_sobel,
    in1k_vgg16_sobel,
    settings_table,
)

ROOT = Path(__file__).resolve().parents[1]
OURS = [name for name in RECIPES if SOURCES.get(name, "ours").startswith("ours")]
PAPER = [in1k_alexnet_sobel, in1k_vgg16_sobel]  # protocol 1a
RESNET = [in1k_resnet50, in1k_resnet50_sobel]  # protocol 1b
V2 = [in1k_resnet50_dcv2, in1k_resnet50_dcv2_800]  # protocol 1c
ODC = [in1k_resnet50_odc]  # protocol 1d


def of(*families):
    return pytest.mark.parametrize("recipe", [recipe for family in families for recipe in family], ids=lambda r: r.__name__)


def fields_that_differ(one: Config, other: Config) -> list[str]:
    return sorted(difference.split(" is ")[0] for difference in differences(one, other))


# --- all of them --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_knows_its_name_and_builds(name):
    config = RECIPES[name]()
    assert config.recipe == name
    assert config == RECIPES[name](), "nothing is drawn or shared"
    assert config.train.momentum == 0.9 and not config.train.nesterov  # 1a, 1b.2, 1c, 1d
    assert config.train.clip_norm == 0  # 12: no gradient clip
    assert config.clustering.num_clusters != 10, "k is not the number of classes"


def test_every_recipe_says_what_it_follows():
    assert set(SOURCES) == set(RECIPES)
    assert all(SOURCES.values())


def test_nothing_is_cropped_smaller_than_the_network_sees():
    for recipe in RECIPES.values():
        images = recipe().images
        assert images.resize >= images.size
        assert images.cache_size in (0, images.resize), "a cached image is kept at the size its centre is cut from"


def test_the_published_runs_are_these():
    published = {recipe.__name__ for recipe in (*PAPER, *RESNET, *V2, *ODC)}
    assert published == {name for name in RECIPES if name not in OURS}


# --- what all published runs share --------------------------------------------------------------------------------------


@of(PAPER, RESNET, V2, ODC)
def test_images_are_cut_as_in_every_protocol(recipe):
    images = recipe().images
    assert (images.size, images.resize) == (224, 256)  # 1a, 1b.3: Resize 256, CenterCrop 224
    assert (images.crop, images.crop_ratio) == ("resized", (3 / 4, 4 / 3))  # 1a, 12: torchvision's defaults
    assert images.flip == 0.5  # 1a, 1b.3, 1c
    assert images.warp == "nearest"  # 12
    assert images.colour == "torchvision"  # 12: in random order, with clamps
    assert (images.zoom, images.shear, images.shift, images.elastic, images.lighting) == (0, 0, 0, 0, 0)
    assert images.cache_size == 0


@of(PAPER, RESNET, V2, ODC)
def test_networks_are_the_published_ones(recipe):
    model = recipe().model
    assert (model.width, model.stem) == (64, "imagenet")
    assert model.mean == (0.485, 0.456, 0.406)  # 1b.3


@of(PAPER, RESNET, ODC)
def test_the_head_has_no_momentum(recipe):
    """1a: a fresh optimizer with momentum 0 each epoch; 1b.2 and 1d: head params momentum 0."""
    assert recipe().train.head_momentum == 0


def test_no_recipe_after_1a_1b_or_1d_is_left_out_of_that():
    for name in RECIPES:
        if name not in OURS and "dcv2" not in name:
            assert RECIPES[name]().train.head_momentum == 0, name


@of(PAPER, RESNET, ODC)
def test_optimisation_that_1a_1b_and_1d_share(recipe):
    train = recipe().train
    assert train.weight_decay == 1e-5  # 1a, 1b.2, 1d; 12: on all parameters
    assert (train.warmup_epochs, train.larc) == (0, 0)  # 12: no warmup
    assert train.plan_length == 1.0  # 1a: reassign 1.0; 1b.4: interval 1
    assert recipe().model.std == (0.229, 0.224, 0.225)  # 1b.3


@of(PAPER, RESNET)
def test_clustering_that_1a_and_1b_share(recipe):
    config = recipe()
    assert config.algorithm == "deepcluster"
    clustering = config.clustering
    assert clustering.num_clusters == 10_000  # 1a, 1b.4
    assert (clustering.pca_dim, clustering.whiten) == (256, True)  # 1a: eigen_power -0.5; 1b.4
    assert (clustering.method, clustering.iterations) == ("kmeans", 20)  # 1a: niter 20, not spherical
    assert (clustering.features, clustering.start) == ("fresh", "cold")  # 1a: one pass per epoch, k random points
    assert (config.train.head, config.train.balance) == ("fresh", "uniform")  # 1a, 1b.4: unif_sampling, no reweight


# --- 1a -----------------------------------------------------------------------------------------------------------------


@of(PAPER)
def test_the_papers_optimisation_is_protocol_1a(recipe):
    train = recipe().train
    assert (train.lr, train.schedule) == (0.05, "constant")
    assert learning_rate(train, 0) == learning_rate(train, 499) == 0.05
    assert train.batch_size == 256
    assert train.epochs == (500 if recipe is in1k_alexnet_sobel else 200)  # 1a: Table 1's model; the code's default


@of(PAPER)
def test_the_papers_augmentation_is_protocol_1a(recipe):
    """RandomResizedCrop and HFlip, no jitter."""
    images = recipe().images
    assert images.crop_scale == (0.08, 1.0)
    names = ("rotation", "brightness", "contrast", "saturation", "hue", "grayscale", "blur")
    assert [getattr(images, name) for name in names] == [0] * 7


def test_the_papers_networks_are_protocol_1as():
    for recipe, name in ((in1k_alexnet_sobel, "alexnet"), (in1k_vgg16_sobel, "vgg16")):
        assert (recipe().model.architecture, recipe().model.sobel) == (name, True)  # main.sh: Sobel on
    assert fields_that_differ(in1k_alexnet_sobel(), in1k_vgg16_sobel()) == ["model.architecture", "recipe", "train.epochs"]


def test_pic_would_be_protocol_1as():
    """nnn 5, sigma 0.2."""
    clustering = in1k_alexnet_sobel().clustering
    assert (clustering.neighbours, clustering.sigma) == (5, 0.2)


# --- 1b -----------------------------------------------------------------------------------------------------------------


@of(RESNET)
def test_imagenets_optimisation_is_protocol_1b2(recipe):
    train = recipe().train
    assert train.batch_size == 64 * 8 == 512
    assert (train.lr, train.schedule, train.schedule_epochs) == (0.1, "constant", 0)  # step [400] of 200 epochs
    assert train.epochs == 200


@of(RESNET, ODC)
def test_imagenets_augmentation_is_protocol_1b3(recipe):
    """1d: the same."""
    images = recipe().images
    assert images.crop_scale == (0.08, 1.0)
    assert images.rotation == 2.0
    assert (images.brightness, images.contrast, images.saturation, images.hue) == (0.4, 0.4, 1.0, 0.5)
    assert images.jitter == 1.0  # always applied
    assert images.grayscale == 0.2
    assert images.blur == 0


@of(RESNET)
def test_imagenets_network_is_protocol_1b1(recipe):
    assert recipe().model.architecture == "resnet50"
    assert recipe().train.reweight_power == 0.5  # 1b.4, where reweight is turned on


def test_the_two_imagenet_runs_differ_in_sobel_alone():
    assert fields_that_differ(in1k_resnet50(), in1k_resnet50_sobel()) == ["model.sobel", "recipe"]
    assert in1k_resnet50_sobel().model.sobel and not in1k_resnet50().model.sobel


# --- 1c -----------------------------------------------------------------------------------------------------------------


@of(V2)
def test_deepcluster_v2s_clustering_is_protocol_1c(recipe):
    config = recipe()
    assert config.algorithm == "deepcluster_v2"
    clustering, v2 = config.clustering, config.v2
    assert [clustering.num_clusters] * v2.num_heads == [3000, 3000, 3000]
    assert (clustering.method, clustering.iterations) == ("spherical", 10)
    assert (clustering.features, clustering.start) == ("remembered", "cold")  # init: K random embeddings
    assert (clustering.pca_dim, clustering.whiten) == (0, False)  # the embeddings as they are
    assert (v2.hidden_dim, v2.projection_dim) == (2048, 128)


@of(V2)
def test_deepcluster_v2s_optimisation_is_protocol_1c(recipe):
    train = recipe().train
    assert (train.lr, train.final_lr, train.warmup_lr, train.warmup_epochs) == (4.8, 0.0048, 0.3, 10)
    assert (train.schedule, train.schedule_epochs) == ("cosine", 0)
    assert learning_rate(train, 0) == 0.3 and learning_rate(train, 10) == 4.8
    assert math.isclose(learning_rate(train, train.epochs), 0.0048)
    assert train.weight_decay == 1e-6
    assert train.larc == 0.001
    assert train.batch_size == 64 * 64 == 4096
    assert train.head_momentum == 0.9  # one optimizer: the projection has the backbone's momentum
    assert (train.head, train.balance, train.plan_length) == ("centroids", "none", 1.0)
    assert train.temperature == 0.1


@of(V2)
def test_deepcluster_v2s_augmentation_is_protocol_1c(recipe):
    images = recipe().images
    assert (images.brightness, images.contrast, images.saturation, images.hue) == (0.8, 0.8, 0.8, 0.2)
    assert images.jitter == 0.8
    assert images.grayscale == 0.2
    assert (images.blur, images.blur_sigma) == (0.5, (0.1, 2.0))
    assert images.rotation == 0


@of(V2)
def test_deepcluster_v2s_network_is_protocol_1c(recipe):
    model = recipe().model
    assert (model.architecture, model.sobel) == ("resnet50", False)
    assert model.std == (0.228, 0.224, 0.225)  # SwAV's own


def test_deepcluster_v2s_crops_are_its_scripts():
    v2 = in1k_resnet50_dcv2().v2
    assert (v2.num_crops, v2.crop_sizes) == ((2, 4), (160, 96))  # 400ep
    assert (v2.min_scales, v2.max_scales) == ((0.08, 0.05), (1.0, 0.14))
    v2 = in1k_resnet50_dcv2_800().v2
    assert (v2.num_crops, v2.crop_sizes) == ((2, 6), (224, 96))  # 800ep
    assert (v2.min_scales, v2.max_scales) == ((0.14, 0.05), (1.0, 0.14))
    assert (in1k_resnet50_dcv2().train.epochs, in1k_resnet50_dcv2_800().train.epochs) == (400, 800)
    found = fields_that_differ(in1k_resnet50_dcv2(), in1k_resnet50_dcv2_800())
    assert found == ["recipe", "train.epochs", "v2.crop_sizes", "v2.min_scales", "v2.num_crops"]


# --- 1d -----------------------------------------------------------------------------------------------------------------


def test_odcs_optimisation_is_protocol_1d():
    train = in1k_resnet50_odc().train
    assert (train.lr, train.schedule, train.milestones, train.gamma) == (0.06, "step", (400,), 0.4)
    assert learning_rate(train, 399) == 0.06 and math.isclose(learning_rate(train, 400), 0.024)
    assert (train.epochs, train.batch_size) == (440, 512)
    assert (train.balance, train.reweight_power) == ("reweight", 0.5)  # n^-0.5; 12: no uniform sampling
    assert train.head == "matched", "labels keep their clusters, so the head keeps its weights"


def test_odcs_clustering_is_protocol_1d():
    config = in1k_resnet50_odc()
    assert config.algorithm == "odc"
    clustering, odc = config.clustering, config.odc
    assert clustering.num_clusters == 10_000
    assert (clustering.pca_dim, clustering.whiten) == (0, False)  # pca_dim -1: L2 only
    assert (clustering.method, clustering.features, clustering.start) == ("kmeans", "remembered", "cold")
    assert (odc.hidden_dim, odc.projection_dim, odc.dropout) == (512, 256, 0.5)  # neck 2048 -> 512 -> 256
    assert odc.momentum == 0.5  # f <- L2(0.5 f_old + 0.5 f_new)
    assert (odc.centroids_every, odc.min_cluster) == (10, 20)
    assert (config.model.architecture, config.model.sobel) == ("resnet50", False)


# --- ours ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OURS)
def test_our_own_decay_as_the_paper(name):
    assert RECIPES[name]().train.weight_decay == 1e-5


@pytest.mark.parametrize("name", [name for name in OURS if RECIPES[name]().algorithm == "deepcluster"])
def test_our_own_deepcluster_is_the_papers_method(name):
    """1a: whitened PCA, twenty iterations of k-means, a fresh head, uniform draws."""
    config = RECIPES[name]()
    clustering, train = config.clustering, config.train
    assert (clustering.method, clustering.features, clustering.whiten) == ("kmeans", "fresh", True)
    assert clustering.iterations == 20
    assert (train.head, train.balance) == ("fresh", "uniform")


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


def test_the_family_on_cifar10_is_measured_against_the_same_run():
    """Beside what each algorithm is, nothing differs: the same network, images, epochs and rate."""
    plain = RECIPES["cifar10_resnet18"]()
    for name in ("cifar10_resnet18_dcv2", "cifar10_resnet18_odc"):
        found = fields_that_differ(plain, RECIPES[name]())
        shared = ("images.", "model.", "probe.", "bank.", "train.epochs", "train.lr", "train.batch", "train.schedule")
        assert not [field for field in found if field.startswith(shared)], name
        assert RECIPES[name]().clustering.num_clusters == 390
    assert fields_that_differ(plain, RECIPES["cifar10_alexnet_sobel"]()) == ["model.architecture", "recipe"]


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


# --- the table ----------------------------------------------------------------------------------------------------------


def test_the_readme_holds_the_table_of_settings():
    assert settings_table() in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_table_says_what_the_protocols_say():
    """One row a recipe, as many cells as columns; facts of 1a, 1c and 1d by hand."""
    header, rule, *rows = [line.strip("|").split("|") for line in settings_table().splitlines()]
    assert len({len(header), len(rule), *map(len, rows)}) == 1
    table = {cells[0].strip(" `"): dict(zip([one.strip() for one in header], cells, strict=True)) for cells in rows}
    assert list(table) == list(RECIPES)
    for name, facts in {
        "in1k_alexnet_sobel": {
            "network": ["alexnet", "Sobel"],
            "images": ["224"],
            "clusters": ["10000", "PCA 256, whitened", "fresh"],
            "epochs": ["500"],
            "batch": ["256"],
            "rate": ["0.05 constant", "1e-05"],
            "balance": ["uniform"],
            "head": ["fresh", "momentum 0"],
        },
        "in1k_resnet50_dcv2": {
            "images": ["2x160 + 4x96"],
            "clusters": ["3 x 3000 spherical", "raw", "remembered"],
            "epochs": ["400"],
            "batch": ["4096"],
            "rate": ["4.8 cosine", "LARC", "1e-06"],
            "head": ["centroids", "0.9"],
        },
        "in1k_resnet50_odc": {
            "network": ["resnet50"],
            "clusters": ["10000", "raw"],
            "rate": ["0.06 step"],
            "balance": ["reweight"],
            "head": ["momentum 0"],
        },
    }.items():
        for column, words in facts.items():
            assert all(word in table[name][column] for word in words), (name, column, table[name][column])
    assert "Sobel" not in table["in1k_resnet50_odc"]["network"]
