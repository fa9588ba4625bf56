"""The configuration as JSON, and what it refuses."""

import json
import re
from dataclasses import replace

import pytest

from raydc.config import (
    BankConfig,
    ClusteringConfig,
    Config,
    ImagesConfig,
    ModelConfig,
    ODCConfig,
    ProbeConfig,
    TrainConfig,
    UsageError,
    V2Config,
    differences,
    from_dict,
    to_dict,
)
from raydc.recipes import RECIPES

REMEDY = "give|raise|lower|change"
nan = float("nan")


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
def test_a_recipe_survives_json(recipe):
    config = recipe()
    back = from_dict(Config, json.loads(json.dumps(to_dict(config))))
    assert back == config == from_dict(Config, to_dict(config))
    assert differences(config, back) == []
    assert isinstance(back.images.crop_scale, tuple) and isinstance(back.model, ModelConfig)


BAD = [
    (ModelConfig, "model", "width", 2),
    (ModelConfig, "model", "stem_stride", 3),
    (ModelConfig, "model", "std", (0.2, 0.0, 0.2)),
    (ImagesConfig, "images", "size", 2),
    (ImagesConfig, "images", "resize", 200),
    (ImagesConfig, "images", "crop_scale", (0.0, 1.0)),
    (ImagesConfig, "images", "crop_scale", (0.5, 0.4)),
    (ImagesConfig, "images", "crop_scale", (0.5, 1.5)),
    (ImagesConfig, "images", "flip", 1.5),
    (ImagesConfig, "images", "grayscale", -0.1),
    *((ImagesConfig, "images", name, -1.0) for name in ("brightness", "contrast", "saturation", "rotation")),
    *((ImagesConfig, "images", name, -1.0) for name in ("zoom", "shear", "shift", "elastic")),
    (ImagesConfig, "images", "rotation", nan),
    (ImagesConfig, "images", "hue", 0.6),
    (ImagesConfig, "images", "shuffle_buffer", 0),
    (ClusteringConfig, "clustering", "num_clusters", 1),
    (ClusteringConfig, "clustering", "num_clusters", -4),
    (ClusteringConfig, "clustering", "pca_dim", -1),
    (ClusteringConfig, "clustering", "iterations", 0),
    (TrainConfig, "train", "epochs", 0),
    (TrainConfig, "train", "batch_size", 0),
    (TrainConfig, "train", "plan_length", 0.0),
    (TrainConfig, "train", "lr", 0.0),
    (TrainConfig, "train", "lr", nan),
    *((TrainConfig, "train", name, -1) for name in ("momentum", "head_momentum", "weight_decay", "clip_norm")),
    *((TrainConfig, "train", name, -1) for name in ("micro_batch", "threads")),
    (TrainConfig, "train", "schedule_epochs", 199),
    (BankConfig, "bank", "num_gpus", 1.5),
]


@pytest.mark.parametrize(("section", "prefix", "name", "value"), BAD)
def test_a_bad_number_names_its_field_and_the_remedy(section, prefix, name, value):
    with pytest.raises(UsageError, match=f"{prefix}.{name}.*({REMEDY})"):
        section(**{name: value})


@pytest.mark.parametrize(
    ("section", "prefix", "name", "value"),
    [
        (ImagesConfig, "images", "zoom", 1.0),  # a scale of 1 - 1 = 0
        (ImagesConfig, "images", "shear", 90.0),  # an infinite tangent
        (ImagesConfig, "images", "crop_ratio", (4 / 3, 3 / 4)),
        (ImagesConfig, "images", "crop_ratio", (0.0, 1.0)),
        (ImagesConfig, "images", "cache_size", -1),
        (BankConfig, "bank", "threads", -1),
        (BankConfig, "bank", "num_actors", 0),
        (ProbeConfig, "probe", "every", -1),
        (ProbeConfig, "probe", "num_images", 0),
        (ProbeConfig, "probe", "images_per_class", -1),
        (ProbeConfig, "probe", "num_neighbours", 0),
        (ImagesConfig, "images", "jitter", 1.1),
        (ImagesConfig, "images", "blur", -0.1),
        (ImagesConfig, "images", "blur_sigma", (0.0, 2.0)),  # a Gaussian of width 0
        (ImagesConfig, "images", "blur_sigma", (2.0, 0.1)),
        (ClusteringConfig, "clustering", "neighbours", 0),
        (ClusteringConfig, "clustering", "sigma", 0.0),
        *(
            (TrainConfig, "train", name, -0.1)
            for name in ("final_lr", "warmup_epochs", "warmup_lr", "reweight_power", "larc")
        ),
        (TrainConfig, "train", "larc", nan),
        (TrainConfig, "train", "temperature", 0.0),
        (TrainConfig, "train", "gamma", 0.0),
        (V2Config, "v2", "num_crops", (0, 0)),
        (V2Config, "v2", "num_crops", (2, -1)),
        (V2Config, "v2", "crop_sizes", (160, 2)),
        (V2Config, "v2", "min_scales", (0.0, 0.05)),
        (V2Config, "v2", "max_scales", (1.0, 0.01)),  # below the least
        (V2Config, "v2", "max_scales", (1.5, 0.14)),
        *((V2Config, "v2", name, 0) for name in ("num_heads", "hidden_dim", "projection_dim")),
        *((ODCConfig, "odc", name, 0) for name in ("hidden_dim", "projection_dim", "centroids_every", "momentum")),
        (ODCConfig, "odc", "momentum", 1.5),
        (ODCConfig, "odc", "dropout", 1.0),
        (ODCConfig, "odc", "min_cluster", -1),
    ],
)
def test_a_number_that_fails_only_later_is_refused_at_once(section, prefix, name, value):
    with pytest.raises(UsageError, match=f"{prefix}.{name}.*({REMEDY})"):
        section(**{name: value})


@pytest.mark.parametrize(
    ("section", "prefix", "name"),
    [
        (ModelConfig, "model", "architecture"),
        (ModelConfig, "model", "stem"),
        (ImagesConfig, "images", "colour"),
        (ImagesConfig, "images", "warp"),
        (TrainConfig, "train", "schedule"),
        (TrainConfig, "train", "balance"),
        (TrainConfig, "train", "head"),
        (ClusteringConfig, "clustering", "method"),
        (ClusteringConfig, "clustering", "features"),
        (ClusteringConfig, "clustering", "start"),
    ],
)
def test_a_misspelt_choice_is_refused(section, prefix, name):
    with pytest.raises(UsageError, match=f"{prefix}.{name}"):
        section(**{name: "cosin"})


# What each algorithm can be, for a pair to be all that is wrong.
V2 = {
    "algorithm": "deepcluster_v2",
    "clustering": {"method": "spherical", "features": "remembered", "pca_dim": 0, "whiten": False},
    "train": {"head": "centroids", "balance": "none"},
}
ODC = {
    "algorithm": "odc",
    "clustering": {"features": "remembered", "pca_dim": 0, "whiten": False},
    "train": {"head": "matched", "balance": "reweight"},
}
SECTIONS = {
    "model": ModelConfig,
    "images": ImagesConfig,
    "clustering": ClusteringConfig,
    "train": TrainConfig,
    "v2": V2Config,
    "bank": BankConfig,
}


def made(base: dict, **changes: dict) -> Config:
    """``base`` with fields of its sections changed."""
    values = {name: value for name, value in base.items() if name == "algorithm"}
    for name, section in SECTIONS.items():
        values[name] = section(**base.get(name, {}) | changes.get(name, {}))
    return Config(**values)


EXCLUDED = [
    (V2, {"clustering": {"features": "fresh"}}, "algorithm deepcluster_v2", "clustering.features fresh"),
    (V2, {"clustering": {"method": "pic"}}, "algorithm deepcluster_v2", "clustering.method pic"),
    (V2, {"train": {"head": "fresh"}}, "algorithm deepcluster_v2", "train.head fresh"),
    (V2, {"train": {"head": "matched"}}, "algorithm deepcluster_v2", "train.head matched"),
    (V2, {"train": {"balance": "reweight"}}, "algorithm deepcluster_v2", "train.balance reweight"),
    (V2, {"images": {"decode": "tasks"}}, "algorithm deepcluster_v2", "images.decode tasks"),
    (V2, {"images": {"size": 96, "resize": 128}}, "v2.crop_sizes 160", "images.resize 128"),
    (ODC, {"clustering": {"features": "fresh"}}, "algorithm odc", "clustering.features fresh"),
    (ODC, {"clustering": {"method": "pic"}}, "algorithm odc", "clustering.method pic"),
    (ODC, {"train": {"head": "fresh"}}, "algorithm odc", "train.head fresh"),
    (ODC, {"train": {"head": "centroids"}}, "algorithm odc", "train.head centroids"),
    (ODC, {"train": {"balance": "uniform"}}, "algorithm odc", "train.balance uniform"),
    ({}, {"clustering": {"pca_dim": 0}}, "clustering.whiten", "clustering.pca_dim 0"),
    ({}, {"clustering": {"method": "pic", "start": "warm"}}, "clustering.method pic", "clustering.start warm"),
    *(
        (
            {},
            {"model": {"architecture": name}, "train": {"head": "centroids"}},
            "train.head centroids",
            f"architecture {name}",
        )
        for name in ("alexnet", "vgg16")
    ),
    (V2, {"clustering": {"method": "kmeans"}}, "deepcluster_v2", "clustering.method kmeans"),
    (V2, {"train": {"balance": "uniform"}}, "deepcluster_v2", "train.balance uniform"),
    (V2, {"images": {"crop": "square"}}, "deepcluster_v2", "images.crop square"),
    (ODC, {"clustering": {"start": "warm"}}, "odc", "clustering.start warm"),
    (ODC, {"clustering": {"pca_dim": 64}}, "odc", "clustering.pca_dim 64"),
    ({}, {"clustering": {"method": "pic"}, "train": {"compile": True}}, "clustering.method pic", "train.compile"),
    ({}, {"clustering": {"method": "pic"}, "bank": {"num_actors": 2}}, "clustering.method pic", "bank.num_actors is 2"),
    ({}, {"clustering": {"features": "remembered"}, "bank": {"num_actors": 2}}, "clustering.features", "bank.num_actors"),
    ({}, {"clustering": {"engine": "torch"}, "bank": {"num_actors": 2}}, "clustering.engine torch", "bank.num_actors is 2"),
    ({}, {"clustering": {"method": "pic", "engine": "torch"}}, "clustering.method pic", "clustering.engine torch"),
    (ODC, {"train": {"balance": "none", "micro_batch": 255}}, "algorithm odc", "train.micro_batch 255"),
    (ODC, {"train": {"balance": "none", "batch_size": 1}}, "algorithm odc", "train.batch_size 1"),
    ({}, {"train": {"nesterov": True, "momentum": 0.0}}, "train.nesterov", "train.momentum"),
    ({}, {"train": {"schedule": "step"}}, "train.schedule step", "train.milestones"),
    ({}, {"train": {"epochs": 5, "warmup_epochs": 6}}, "train.warmup_epochs 6", "train.epochs 5"),
    ({}, {"v2": {"num_crops": (2, 4, 4)}}, "v2.num_crops", "v2.crop_sizes"),
    ({}, {"v2": {"crop_sizes": (160,)}}, "v2.num_crops", "v2.crop_sizes"),
    ({}, {"v2": {"min_scales": (0.1,)}}, "v2.num_crops", "v2.min_scales"),
    ({}, {"v2": {"max_scales": (1.0, 0.5, 0.1)}}, "v2.num_crops", "v2.max_scales"),
    ({}, {"v2": {"crop_sizes": (96, 160)}}, "v2.crop_sizes", "the largest first"),
]


@pytest.mark.parametrize(("base", "changes", "one", "other"), EXCLUDED, ids=[f"{a} - {b}" for _, _, a, b in EXCLUDED])
def test_what_excludes_each_other_is_named_in_one_sentence(base, changes, one, other):
    made(base)
    with pytest.raises(UsageError) as error:
        made(base, **changes)
    message = str(error.value)
    assert one in message and other in message
    assert re.search(REMEDY, message), "and what to do"
    assert not re.search(r"[.?!](\s|$)", message), "one sentence"


@pytest.mark.parametrize(
    ("base", "changes"),
    [
        ({}, {"clustering": {"features": "remembered"}, "train": {"head": "matched", "balance": "reweight"}}),
        ({}, {"clustering": {"method": "spherical", "start": "warm"}, "train": {"head": "centroids"}}),
        ({}, {"clustering": {"method": "pic"}, "model": {"architecture": "vgg16"}}),
        ({}, {"clustering": {"pca_dim": 0, "whiten": False}}),
        ({}, {"images": {"decode": "tasks"}}),
        ({}, {"images": {"size": 96, "resize": 128}}),  # crops that only DeepCluster-v2 has
        (V2, {"images": {"size": 96, "resize": 160}}),
        (V2, {"model": {"architecture": "alexnet"}}),  # its head sees what is clustered
        (V2, {"v2": {"crop_sizes": (160, 160)}}),
        (ODC, {"train": {"balance": "none"}, "clustering": {"method": "spherical"}}),
    ],
)
def test_what_does_not_exclude_each_other_is_let_through(base, changes):
    config = made(base, **changes)
    for name, values in changes.items():
        assert values.items() <= to_dict(getattr(config, name)).items()


@pytest.mark.parametrize("pca_dim", [64, 256])
def test_heads_of_centroids_want_the_features_that_are_clustered(pca_dim):
    """DeepCluster-v2's heads work in the projection's space; centroids of a PCA's mean other things in it."""
    made(V2)
    with pytest.raises(UsageError, match="algorithm deepcluster_v2.*clustering.pca_dim"):
        made(V2, clustering={"pca_dim": pca_dim})


@pytest.mark.parametrize(("batch_size", "num_workers"), [(256, 3), (100, 8), (1, 2)])
def test_the_batch_must_split_evenly_over_workers(batch_size, num_workers):
    with pytest.raises(UsageError, match=f"train.batch_size {batch_size} .*num_workers {num_workers}; change one"):
        Config(num_workers=num_workers, train=TrainConfig(batch_size=batch_size))
    for fine in (0, 1, batch_size):
        Config(num_workers=fine, train=TrainConfig(batch_size=batch_size))


def test_negative_workers_are_refused():
    with pytest.raises(UsageError, match="num_workers is -1; give"):
        Config(num_workers=-1)


def test_an_unknown_field_is_named():
    with pytest.raises(UsageError, match="Config has no field learning_rate"):
        from_dict(Config, {"learning_rate": 1})
    with pytest.raises(UsageError, match="TrainConfig has no field adam, lars"):
        from_dict(Config, {"train": {"lars": True, "lr": 0.1, "adam": True}})
    with pytest.raises(UsageError, match="V2Config has no field crops"):
        from_dict(Config, {"v2": {"crops": [2, 4]}})


def test_a_bad_value_in_json_is_refused_too():
    with pytest.raises(UsageError, match="train.lr is -1"):
        from_dict(Config, {"train": {"lr": -1}})


def test_differences_say_there_and_here():
    ours = RECIPES["digits"]()
    theirs = replace(ours, seed=3, train=replace(ours.train, lr=0.25), images=replace(ours.images, crop_ratio=(0.5, 2.0)))
    assert differences(ours, theirs) == [
        "seed is 3 there and 0 here",
        "images.crop_ratio is (0.5, 2.0) there and (1.0, 1.0) here",
        "train.lr is 0.25 there and 0.15 here",
    ]
