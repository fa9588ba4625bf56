"""The configuration as JSON, and what it refuses."""

import json
from dataclasses import replace

import pytest

from raydc.config import (
    BankConfig,
    ClusteringConfig,
    Config,
    ImagesConfig,
    ModelConfig,
    ProbeConfig,
    TrainConfig,
    UsageError,
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
    assert back == config
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
    (ClusteringConfig, "clustering", "pca_dim", 0),
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
        (ProbeConfig, "probe", "every", -1),
        (ProbeConfig, "probe", "num_images", 0),
        (ProbeConfig, "probe", "images_per_class", -1),
        (ProbeConfig, "probe", "num_neighbours", 0),
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
    ],
)
def test_a_misspelt_choice_is_refused(section, prefix, name):
    with pytest.raises(UsageError, match=f"{prefix}.{name}"):
        section(**{name: "cosin"})


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
    with pytest.raises(UsageError, match="TrainConfig has no field larc, lars"):
        from_dict(Config, {"train": {"larc": True, "lr": 0.1, "lars": True}})


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
