"""The whole configuration of a pretraining run: frozen dataclasses; the string under each field documents it.

Standard library only. Named runs are functions in ``recipes.py``; the command line is made of these fields by the
scripts in ``jobs/``; a run directory keeps its configuration as JSON.
"""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass, field
from typing import Literal


class UsageError(Exception):
    """Something the user asked for cannot be; the message names the thing and the remedy. Exit code 2.

    No ValueError, which the command line parser would wrap in its own words.
    """


class RunError(RuntimeError):
    """A run that cannot go on (NaN loss, full disk, too many dead workers); the message names the remedy. Exit code 1."""


def check(condition: bool, message: str) -> None:
    """UsageError with the message unless the condition holds."""
    if not condition:
        raise UsageError(message)


def _check_choices(section: str, config) -> None:
    """Every field that is a choice holds one of its choices (the command line sees to it, other callers may not)."""
    for name, hint in typing.get_type_hints(type(config)).items():
        if typing.get_origin(hint) is Literal:
            value, choices = getattr(config, name), typing.get_args(hint)
            check(value in choices, f"{section}{name} is {value!r}; give {', '.join(choices)}")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The backbone."""

    architecture: Literal["resnet10", "resnet18", "resnet34", "resnet50"] = "resnet18"
    """Layers of the residual network; resnet10 has one basic block a stage."""
    width: int = 64
    """Channels of the first stage; 64 is torchvision's network."""
    stem: Literal["imagenet", "small"] = "imagenet"
    """imagenet: 7x7 convolution of stride 2 and a max-pool; small: one 3x3 convolution."""
    stem_stride: int = 2
    """Stride of the small stem."""
    sobel: bool = False
    """Replace colours by two fixed gradient maps (the paper's models)."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Mean of the pixels in [0, 1], per channel."""
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """Standard deviation of the pixels in [0, 1], per channel."""

    def __post_init__(self) -> None:
        _check_choices("model.", self)
        check(self.width >= 4, f"model.width is {self.width}; give at least 4")
        check(self.stem_stride in (1, 2, 4), f"model.stem_stride is {self.stem_stride}; give 1, 2 or 4")
        check(min(self.std) > 0, f"model.std is {self.std}; give positive numbers")


@dataclass(frozen=True, kw_only=True)
class ImagesConfig:
    """How images are kept, cropped and augmented."""

    size: int = 224
    """Side of what the network sees, in pixels."""
    resize: int = 256
    """Short side an image has when its centre is cropped for extraction, in pixels."""
    cache: Literal["auto", "yes", "no"] = "auto"
    """Keep the decoded images in memory (one array per node), or stream them; auto: keep them if they fit half of a
    node's object store."""
    cache_size: int = 0
    """Short side of the images in the cache, in pixels; 0 keeps their own size."""
    decode: Literal["auto", "worker", "tasks"] = "auto"
    """Where streamed images are decoded: in threads of the training worker, or in Ray Data tasks on any node; auto:
    tasks when the cluster has more than 4 CPUs for each worker."""
    shuffle_buffer: int = 2048
    """Images a streaming worker holds to mix them: encoded, or as crops where data tasks decode."""
    crop: Literal["resized", "square"] = "resized"
    """Training crops: a random box, resized (RandomResizedCrop); or size pixels anywhere in the central square of resize."""
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Share of the image's area a random training crop covers."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Aspect ratio of a random training crop."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    rotation: float = 0.0
    """Largest rotation, in degrees."""
    zoom: float = 0.0
    """Largest relative change of scale after the crop, e.g. 0.2 for 0.8 to 1.2."""
    shear: float = 0.0
    """Largest horizontal and vertical shear, in degrees."""
    shift: float = 0.0
    """Largest shift, as a share of the side."""
    elastic: float = 0.0
    """Size of a smooth random deformation (standard deviation), as a share of the side."""
    warp: Literal["nearest", "bilinear"] = "nearest"
    """Interpolation of rotation, zoom, shear, shift and elastic (torchvision's rotation default is nearest)."""
    brightness: float = 0.0
    """Jitter: factor drawn from 1 - b to 1 + b."""
    contrast: float = 0.0
    """Jitter: factor drawn from 1 - c to 1 + c."""
    saturation: float = 0.0
    """Jitter: factor drawn from 1 - s to 1 + s."""
    hue: float = 0.0
    """Jitter: shift drawn from -h to h, in turns of the colour circle (at most 0.5)."""
    grayscale: float = 0.0
    """Probability that a crop loses its colours."""
    lighting: float = 0.0
    """AlexNet's colour noise: standard deviation of the shift along ImageNet's three principal colours."""
    colour: Literal["torchvision", "linear"] = "torchvision"
    """torchvision: jitter in random order with clamping, as in the references; linear: the same factors as one 3x3 matrix
    and a bias for each image (hue turns in YIQ), four times faster on a CPU."""

    def __post_init__(self) -> None:
        _check_choices("images.", self)
        check(self.size >= 4, f"images.size is {self.size}; give at least 4 pixels")
        check(self.resize >= self.size, f"images.resize {self.resize} is below images.size {self.size}; raise it")
        low, high = self.crop_scale
        check(0 < low <= high <= 1, f"images.crop_scale is {self.crop_scale}; give 0 < low <= high <= 1")
        low, high = self.crop_ratio
        check(0 < low <= high, f"images.crop_ratio is {self.crop_ratio}; give 0 < low <= high")
        check(self.cache_size >= 0, f"images.cache_size is {self.cache_size}; give 0 or more pixels")
        check(self.zoom < 1, f"images.zoom is {self.zoom}; give less than 1")
        check(self.shear < 90, f"images.shear is {self.shear}; give less than 90 degrees")
        for name in ("flip", "grayscale"):
            check(0 <= getattr(self, name) <= 1, f"images.{name} is {getattr(self, name)}; give a probability")
        for name in ("brightness", "contrast", "saturation", "rotation", "zoom", "shear", "shift", "elastic", "lighting"):
            check(getattr(self, name) >= 0, f"images.{name} is {getattr(self, name)}; give 0 or more")
        check(0 <= self.hue <= 0.5, f"images.hue is {self.hue}; give 0 to 0.5")
        check(self.shuffle_buffer >= 1, f"images.shuffle_buffer is {self.shuffle_buffer}; give at least 1")


@dataclass(frozen=True, kw_only=True)
class ClusteringConfig:
    """How features become pseudo-labels."""

    num_clusters: int = 0
    """k; 0 takes num_images // 128 (10,000 on ImageNet, as in the paper). Not the number of classes: far more."""
    pca_dim: int = 256
    """Dimensions kept by the PCA (at most the feature's)."""
    whiten: bool = True
    """Divide each kept direction by its standard deviation."""
    iterations: int = 20
    """Iterations of k-means."""

    def __post_init__(self) -> None:
        _check_choices("clustering.", self)
        check(self.num_clusters != 1, "clustering.num_clusters is 1; give 2 or more, or 0 for num_images // 128")
        check(self.num_clusters >= 0, f"clustering.num_clusters is {self.num_clusters}; give 2 or more, or 0")
        check(self.pca_dim >= 1, f"clustering.pca_dim is {self.pca_dim}; give at least 1")
        check(self.iterations >= 1, f"clustering.iterations is {self.iterations}; give at least 1")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One epoch of training on the pseudo-labels, and how many of them."""

    epochs: int = 200
    """Rounds of extract, cluster, reassign, train."""
    batch_size: int = 256
    """Images in a step, over all workers."""
    plan_length: float = 1.0
    """Draws between two clusterings, in multiples of the number of images (the original's --reassign)."""
    balance: Literal["uniform", "none"] = "uniform"
    """uniform: draw uniformly over the non-empty clusters; none: every image once."""
    lr: float = 0.05
    """Learning rate of SGD for a whole batch."""
    schedule: Literal["constant", "cosine", "step"] = "constant"
    """constant, as in the paper; cosine falls to 0 at schedule_epochs; step falls by gamma at each of the milestones."""
    schedule_epochs: int = 0
    """Length of the cosine where it is not the length of the run; 0: epochs."""
    milestones: tuple[float, ...] = ()
    """Epochs after which the step schedule falls."""
    gamma: float = 0.1
    """What the step schedule multiplies the rate by."""
    momentum: float = 0.9
    """Momentum of the backbone."""
    nesterov: bool = False
    """Nesterov's momentum."""
    head_momentum: float = 0.0
    """Momentum of the head, forgotten at every reassignment; 0 in the references. Short epochs want the backbone's."""
    weight_decay: float = 1e-5
    """L2 penalty on all parameters, biases and BatchNorm too, as in the references."""
    clip_norm: float = 0.0
    """Largest norm of the gradient; 0 does not clip."""
    micro_batch: int = 0
    """Images a worker sends through the network at once; gradients accumulate to the batch. 0: the whole batch."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 autocast on GPUs and on CPUs with bf16 instructions."""
    channels_last: Literal["auto", "yes", "no"] = "auto"
    """Memory layout of images and convolutions; auto: yes."""
    threads: int = 0
    """CPU threads of a worker; 0: the node's CPUs shared by its workers."""
    compile: bool = False
    """torch.compile the network."""

    def __post_init__(self) -> None:
        _check_choices("train.", self)
        for name in ("epochs", "batch_size", "plan_length", "lr", "gamma"):
            check(getattr(self, name) > 0, f"train.{name} is {getattr(self, name)}; give a positive number")
        for name in ("momentum", "head_momentum", "weight_decay", "clip_norm", "micro_batch", "threads"):
            check(getattr(self, name) >= 0, f"train.{name} is {getattr(self, name)}; give 0 or more")
        check(not self.nesterov or self.momentum > 0, "train.nesterov needs train.momentum above 0; give one or the other")
        check(self.schedule != "step" or self.milestones, "train.schedule step needs train.milestones; give the epochs")
        check(
            self.schedule_epochs == 0 or self.schedule_epochs >= self.epochs,
            f"train.schedule_epochs {self.schedule_epochs} is below train.epochs {self.epochs}; raise it or give 0",
        )


@dataclass(frozen=True, kw_only=True)
class BankConfig:
    """The actor that holds the features and the faiss index."""

    num_gpus: float = 0.1
    """Share of a GPU for the index, where workers use GPUs."""
    threads: int = 0
    """CPU threads of k-means; 0: all CPUs of the bank's node (the workers wait meanwhile)."""

    def __post_init__(self) -> None:
        check(0 <= self.num_gpus < 1, f"bank.num_gpus is {self.num_gpus}; give 0 or a share below 1")
        check(self.threads >= 0, f"bank.threads is {self.threads}; give 0 or more")


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """How well the features serve, measured on labels the training never sees."""

    every: int = 5
    """Epochs between two probes; 0: only before the first and after the last epoch."""
    num_images: int = 10_000
    """Training images, at most, that the probes learn from."""
    images_per_class: int = 0
    """Labels of each class the linear probe learns from; 0: all of num_images."""
    num_neighbours: int = 20
    """Neighbours that vote in the kNN probe."""

    def __post_init__(self) -> None:
        for name, least in (("every", 0), ("num_images", 1), ("images_per_class", 0), ("num_neighbours", 1)):
            check(getattr(self, name) >= least, f"probe.{name} is {getattr(self, name)}; give {least} or more")


@dataclass(frozen=True, kw_only=True)
class Config:
    """A pretraining run."""

    recipe: str = "custom"
    """Name of the recipe these settings come from."""
    seed: int = 0
    """Where every random number begins."""
    data: str = ""
    """Folder of shards made by jobs/make_shards.py; digits needs none."""
    run_dir: str = ""
    """Where the run lives: a local path, or s3://, gs:// on a cluster of several nodes. Default: runs/RECIPE."""
    num_workers: int = 1
    """Training workers; 0 runs everything in this process, without Ray, for debugging."""
    use_gpu: Literal["auto", "yes", "no"] = "auto"
    """Whether each worker takes a GPU; auto: if there are enough."""
    deterministic: bool = False
    """Bit-equal runs on a GPU too, at some cost; on CPUs they are, where the images fit into memory."""
    max_failures: int = 3
    """Times a run starts again from its last commit point after a worker died."""
    verbose: bool = False
    """Let Ray talk."""
    model: ModelConfig = field(default_factory=ModelConfig)
    images: ImagesConfig = field(default_factory=ImagesConfig)
    clustering: ClusteringConfig = field(default_factory=ClusteringConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    bank: BankConfig = field(default_factory=BankConfig)
    probe: ProbeConfig = field(default_factory=ProbeConfig)

    def __post_init__(self) -> None:
        _check_choices("", self)
        check(self.max_failures >= 0, f"max_failures is {self.max_failures}; give 0 or more")
        check(self.seed >= 0, f"seed is {self.seed}; give 0 or more")
        check(self.num_workers >= 0, f"num_workers is {self.num_workers}; give 0 or more")
        workers = max(1, self.num_workers)
        check(
            self.train.batch_size % workers == 0,
            f"train.batch_size {self.train.batch_size} is not a multiple of num_workers {workers}; change one of them",
        )


def to_dict(config) -> dict:
    """The configuration as plain JSON types."""
    return dataclasses.asdict(config)


def from_dict(cls, values: dict):
    """The configuration back from JSON; an unknown field is a UsageError that names it."""
    hints = typing.get_type_hints(cls)
    unknown = sorted(set(values) - set(hints))
    check(not unknown, f"{cls.__name__} has no field {', '.join(unknown)}; the run was written by another version")
    return cls(**{name: _from_json(hints[name], value) for name, value in values.items()})


def _from_json(hint, value):
    if dataclasses.is_dataclass(hint):
        return from_dict(hint, value)
    return tuple(value) if typing.get_origin(hint) is tuple else value


def differences(ours, theirs, prefix: str = "") -> list[str]:
    """One phrase for each field that differs, e.g. ``train.lr is 0.1 there and 0.05 here`` (there: ``theirs``)."""
    found = []
    for spec in dataclasses.fields(ours):
        mine, other = getattr(ours, spec.name), getattr(theirs, spec.name)
        if dataclasses.is_dataclass(mine):
            found += differences(mine, other, f"{prefix}{spec.name}.")
        elif mine != other:
            found.append(f"{prefix}{spec.name} is {other!r} there and {mine!r} here")
    return found
