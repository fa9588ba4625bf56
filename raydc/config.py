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


NOT_NEGATIVE = ("final_lr", "warmup_epochs", "warmup_lr", "reweight_power", "larc")  # of TrainConfig
# What an algorithm leaves no choice in.
NEEDS: dict[str, dict[str, tuple]] = {
    "deepcluster": {},
    "deepcluster_v2": {
        "clustering.features": ("remembered",),
        "clustering.method": ("spherical",),
        "clustering.pca_dim": (0,),
        "train.head": ("centroids",),
        "train.balance": ("none",),
        "images.crop": ("resized",),
    },
    "odc": {
        "clustering.features": ("remembered",),
        "clustering.method": ("kmeans", "spherical"),
        "clustering.pca_dim": (0,),
        "clustering.start": ("cold",),
        "train.head": ("matched",),
        "train.balance": ("reweight", "none"),
    },
}


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The backbone."""

    architecture: Literal["resnet10", "resnet18", "resnet34", "resnet50", "alexnet", "vgg16"] = "resnet18"
    """resnet10 has one basic block a stage; alexnet and vgg16 are the paper's, with BatchNorm; their feature is fc7."""
    width: int = 64
    """64 is the published network; another number scales all channels (of a residual network's first stage: it is them)."""
    stem: Literal["imagenet", "small"] = "imagenet"
    """imagenet: the published network's; small: one 3x3 convolution and no max-pool after it, for images of 32 pixels."""
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
    jitter: float = 1.0
    """Probability that a crop's brightness, contrast, saturation and hue are changed at all."""
    grayscale: float = 0.0
    """Probability that a crop loses its colours."""
    blur: float = 0.0
    """Probability of a Gaussian blur."""
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    """Standard deviation of the blur, in pixels of the crop."""
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
        low, high = self.blur_sigma
        check(0 < low <= high, f"images.blur_sigma is {self.blur_sigma}; give 0 < low <= high")
        for name in ("flip", "jitter", "grayscale", "blur"):
            check(0 <= getattr(self, name) <= 1, f"images.{name} is {getattr(self, name)}; give a probability")
        for name in ("brightness", "contrast", "saturation", "rotation", "zoom", "shear", "shift", "elastic", "lighting"):
            check(getattr(self, name) >= 0, f"images.{name} is {getattr(self, name)}; give 0 or more")
        check(0 <= self.hue <= 0.5, f"images.hue is {self.hue}; give 0 to 0.5")
        check(self.shuffle_buffer >= 1, f"images.shuffle_buffer is {self.shuffle_buffer}; give at least 1")


@dataclass(frozen=True, kw_only=True)
class ClusteringConfig:
    """How features become pseudo-labels."""

    method: Literal["kmeans", "spherical", "pic"] = "kmeans"
    """kmeans: the paper's; spherical: by cosine, with centroids of length one (DeepCluster-v2); pic: power iteration
    clustering of the graph of nearest neighbours, which finds the number of clusters itself."""
    features: Literal["fresh", "remembered"] = "fresh"
    """fresh: an extraction pass before each clustering; remembered: the feature each image had when it was last trained
    on, which saves the pass; one pass before the first epoch fills them."""
    start: Literal["cold", "warm"] = "cold"
    """Where k-means begins: at random images, or at the means of today's features under the last labels."""
    num_clusters: int = 0
    """k; 0 takes num_images // 128 (10,000 on ImageNet, as in the paper). Not the number of classes: far more. PIC finds
    its own."""
    pca_dim: int = 256
    """Dimensions kept by the PCA (at most the feature's); 0 (with --clustering.no-whiten): no PCA, the features as they
    are, at length one."""
    whiten: bool = True
    """Divide each kept direction by its standard deviation."""
    iterations: int = 20
    """Iterations of k-means."""
    engine: Literal["faiss", "auto", "torch"] = "faiss"
    """Who runs Lloyd's iterations: faiss, torch (scores of 8-bit integers, for features after a PCA), or auto: torch where
    there is a PCA and the CPU's flags and the sizes promise that it is faster."""
    neighbours: int = 5
    """PIC: neighbours of each image in the graph."""
    sigma: float = 0.2
    """PIC: width of the Gaussian of the distance between neighbours."""

    def __post_init__(self) -> None:
        _check_choices("clustering.", self)
        check(self.num_clusters != 1, "clustering.num_clusters is 1; give 2 or more, or 0 for num_images // 128")
        check(self.num_clusters >= 0, f"clustering.num_clusters is {self.num_clusters}; give 2 or more, or 0")
        check(self.pca_dim >= 0, f"clustering.pca_dim is {self.pca_dim}; give 1 or more, or 0 for no PCA")
        check(self.iterations >= 1, f"clustering.iterations is {self.iterations}; give at least 1")
        check(self.neighbours >= 1, f"clustering.neighbours is {self.neighbours}; give at least 1")
        check(self.sigma > 0, f"clustering.sigma is {self.sigma}; give a positive number")
        check(
            self.pca_dim > 0 or not self.whiten,
            "clustering.whiten needs the PCA that clustering.pca_dim 0 leaves out; give --clustering.no-whiten or a pca_dim",
        )
        check(
            self.method != "pic" or self.start == "cold",
            "clustering.method pic has no centroids for clustering.start warm; give cold or another method",
        )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One epoch of training on the pseudo-labels, and how many of them."""

    epochs: int = 200
    """Rounds of extract, cluster, reassign, train."""
    batch_size: int = 256
    """Images in a step, over all workers."""
    plan_length: float = 1.0
    """Draws between two clusterings, in multiples of the number of images (the original's --reassign)."""
    balance: Literal["uniform", "reweight", "none"] = "uniform"
    """uniform: draw uniformly over the non-empty clusters; reweight: every image once, its loss weighted by its cluster's
    size; none: every image once."""
    reweight_power: float = 0.5
    """Weights are the clusters' sizes to minus this power (1: like uniform draws)."""
    head: Literal["fresh", "matched", "centroids"] = "fresh"
    """The head after a clustering. fresh: new weights (the paper's); matched: each cluster takes over the weights and
    momentum of the cluster before that shares most images with it; centroids: made of the centroids, so that training
    begins with scores that give the pseudo-labels."""
    temperature: float = 1.0
    """What scores of a head made of centroids are divided by; DeepCluster-v2, whose features have length one, takes 0.1."""
    lr: float = 0.05
    """Learning rate of SGD for a whole batch."""
    schedule: Literal["constant", "cosine", "step"] = "constant"
    """constant, as in the paper; cosine falls to final_lr at schedule_epochs; step falls by gamma at each milestone."""
    final_lr: float = 0.0
    """Where the cosine ends."""
    warmup_epochs: float = 0.0
    """Epochs in which the rate rises evenly from warmup_lr; the cosine begins after them."""
    warmup_lr: float = 0.0
    """Where the warm-up begins."""
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
    """Momentum of the head (in DeepCluster-v2 of the projection), forgotten with the weights at a reassignment; 0 in the
    references but v2's. Short epochs want the backbone's."""
    weight_decay: float = 1e-5
    """L2 penalty on all parameters, biases and BatchNorm too, as in the references."""
    larc: float = 0.0
    """LARC (You et al., 2017): each tensor's step is this share of its norm, times lr; 0: plain SGD."""
    clip_norm: float = 0.0
    """Largest norm of the gradient; 0 does not clip."""
    micro_batch: int = 0
    """Images a worker sends through the network at once; gradients accumulate to the batch. 0: the whole batch."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 autocast on GPUs and on CPUs with bf16 instructions."""
    channels_last: Literal["auto", "yes", "no"] = "auto"
    """Memory layout of images and convolutions; auto: yes."""
    threads: int = 0
    """CPU threads of a worker; 0: the node's CPUs shared by its workers. May change in a run that was begun."""
    compile: bool = False
    """torch.compile the network."""

    def __post_init__(self) -> None:
        _check_choices("train.", self)
        for name in ("epochs", "batch_size", "plan_length", "lr", "gamma", "temperature"):
            check(getattr(self, name) > 0, f"train.{name} is {getattr(self, name)}; give a positive number")
        for name in (*NOT_NEGATIVE, "momentum", "head_momentum", "weight_decay", "clip_norm", "micro_batch", "threads"):
            check(getattr(self, name) >= 0, f"train.{name} is {getattr(self, name)}; give 0 or more")
        check(not self.nesterov or self.momentum > 0, "train.nesterov needs train.momentum above 0; give one or the other")
        check(self.schedule != "step" or self.milestones, "train.schedule step needs train.milestones; give the epochs")
        check(
            self.warmup_epochs <= (self.schedule_epochs or self.epochs),
            f"train.warmup_epochs {self.warmup_epochs} is above train.epochs {self.epochs}; lower it",
        )
        check(
            self.schedule_epochs == 0 or self.schedule_epochs >= self.epochs,
            f"train.schedule_epochs {self.schedule_epochs} is below train.epochs {self.epochs}; raise it or give 0",
        )


@dataclass(frozen=True, kw_only=True)
class V2Config:
    """What DeepCluster-v2 adds (Caron et al., 2020, appendix): several crops, a projection and several heads."""

    num_crops: tuple[int, ...] = (2, 4)
    """Crops of an image in each step, of each size. The first two are remembered and clustered."""
    crop_sizes: tuple[int, ...] = (160, 96)
    """Sides of the crops, in pixels."""
    min_scales: tuple[float, ...] = (0.08, 0.05)
    """Least share of the image that a crop of each size covers."""
    max_scales: tuple[float, ...] = (1.0, 0.14)
    """Largest share of the image that a crop of each size covers."""
    num_heads: int = 3
    """Clusterings, and so losses, of an epoch; head h clusters the crop h mod 2."""
    hidden_dim: int = 2048
    """Width of the projection's hidden layer."""
    projection_dim: int = 128
    """Dimensions that are clustered."""

    def __post_init__(self) -> None:
        lists = {name: len(getattr(self, name)) for name in ("num_crops", "crop_sizes", "min_scales", "max_scales")}
        different = [name for name in lists if lists[name] != lists["num_crops"]]
        check(not different, f"v2.num_crops and v2.{', v2.'.join(different)} have different lengths; give one value a size")
        check(min((*self.num_crops, 0)) >= 0 and sum(self.num_crops) >= 1, f"v2.num_crops is {self.num_crops}; give a crop")
        check(min((*self.crop_sizes, 4)) >= 4, f"v2.crop_sizes is {self.crop_sizes}; give at least 4 pixels")
        ordered = tuple(sorted(self.crop_sizes, reverse=True))
        check(self.crop_sizes == ordered, f"v2.crop_sizes is {self.crop_sizes}; give the largest first")
        for low, high in zip(self.min_scales, self.max_scales, strict=True):
            check(0 < low <= high <= 1, f"v2.min_scales {low} and v2.max_scales {high}: give 0 < min <= max <= 1")
        for name in ("num_heads", "hidden_dim", "projection_dim"):
            check(getattr(self, name) >= 1, f"v2.{name} is {getattr(self, name)}; give at least 1")


@dataclass(frozen=True, kw_only=True)
class ODCConfig:
    """What online deep clustering adds (Zhan et al., CVPR 2020): labels that change with each step."""

    hidden_dim: int = 512
    """Width of the neck's hidden layer."""
    projection_dim: int = 256
    """Dimensions that are remembered and clustered."""
    dropout: float = 0.5
    """Of the neck's hidden layer."""
    momentum: float = 0.5
    """Share of the new feature in what is remembered of an image."""
    centroids_every: int = 10
    """Steps between two updates of the centroids."""
    min_cluster: int = 20
    """Smaller clusters are dissolved; the largest cluster is split in their place."""

    def __post_init__(self) -> None:
        for name in ("hidden_dim", "projection_dim", "centroids_every"):
            check(getattr(self, name) >= 1, f"odc.{name} is {getattr(self, name)}; give at least 1")
        check(0 <= self.dropout < 1, f"odc.dropout is {self.dropout}; give 0 to below 1")
        check(0 < self.momentum <= 1, f"odc.momentum is {self.momentum}; give above 0 to 1")
        check(self.min_cluster >= 0, f"odc.min_cluster is {self.min_cluster}; give 0 or more")


@dataclass(frozen=True, kw_only=True)
class BankConfig:
    """The actor that holds the features and the faiss index."""

    num_gpus: float = 0.1
    """Share of a GPU for the index, where workers use GPUs."""
    threads: int = 0
    """CPU threads of k-means; 0: all CPUs of the bank's node (the workers wait meanwhile)."""
    num_actors: int = 1
    """Actors that share the features by image_id, on any nodes, where one machine's memory is too small for all of them."""

    def __post_init__(self) -> None:
        check(self.num_actors >= 1, f"bank.num_actors is {self.num_actors}; give 1 or more")
        check(0 <= self.num_gpus < 1, f"bank.num_gpus is {self.num_gpus}; give 0 or a share below 1")
        check(self.threads >= 0, f"bank.threads is {self.threads}; give 0 or more")


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """How well the features serve, measured on labels the training never sees."""

    every: int = 5
    """Epochs between two probes; 0: only before the first and after the last epoch."""
    baselines: bool = True
    """Probe before the first epoch what training must beat: the fresh network and raw pixels."""
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
    algorithm: Literal["deepcluster", "deepcluster_v2", "odc"] = "deepcluster"
    """Which member of the family."""
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
    v2: V2Config = field(default_factory=V2Config)
    odc: ODCConfig = field(default_factory=ODCConfig)

    def __post_init__(self) -> None:
        _check_choices("", self)
        self._check_algorithm()
        check(self.max_failures >= 0, f"max_failures is {self.max_failures}; give 0 or more")
        check(self.seed >= 0, f"seed is {self.seed}; give 0 or more")
        check(self.num_workers >= 0, f"num_workers is {self.num_workers}; give 0 or more")
        workers = max(1, self.num_workers)
        check(
            self.train.batch_size % workers == 0,
            f"train.batch_size {self.train.batch_size} is not a multiple of num_workers {workers}; change one of them",
        )
        self._check_micro_batch()

    def _check_micro_batch(self) -> None:
        """The layers over the backbone of DeepCluster-v2 and ODC have BatchNorm, which one feature alone tells nothing."""
        part = self.train.batch_size // max(1, self.num_workers)
        piece = min(part, self.train.micro_batch or part)
        crops = sum(self.v2.num_crops) if self.algorithm == "deepcluster_v2" else 1
        check(
            self.algorithm == "deepcluster" or crops > 1 or (piece > 1 and part % piece != 1),
            f"algorithm {self.algorithm} needs 2 images at once or more, and train.micro_batch {self.train.micro_batch} "
            f"leaves one of the {part} that train.batch_size {self.train.batch_size} gives a worker; change one of them",
        )

    def _check_algorithm(self) -> None:
        """Choices that an algorithm or a network leaves no freedom in; a UsageError names both fields."""
        for field_name, needed in NEEDS[self.algorithm].items():
            section, name = field_name.split(".")
            value = getattr(getattr(self, section), name)
            check(
                value in needed,
                f"algorithm {self.algorithm} excludes {field_name} {value}; give --{field_name.replace('_', '-')} "
                f"{' or '.join(map(str, needed))}, or another algorithm",
            )
        check(
            self.algorithm != "deepcluster"
            or self.train.head != "centroids"
            or self.model.architecture.startswith("resnet"),
            f"train.head centroids needs features that the head sees as they are clustered, and model.architecture "
            f"{self.model.architecture} has a ReLU between; give --train.head matched or a residual network",
        )
        check(
            self.clustering.method != "pic" or not self.train.compile,
            "clustering.method pic changes the head in every epoch, which train.compile cannot follow; give one of them",
        )
        check(
            self.clustering.method != "pic" or self.clustering.engine != "torch",
            "clustering.method pic has no use for clustering.engine torch, which runs k-means; give faiss or another method",
        )
        for name, fitting in (("method", ("kmeans", "spherical")), ("features", ("fresh",)), ("engine", ("faiss",))):
            value = getattr(self.clustering, name)
            check(
                self.bank.num_actors == 1 or value in fitting,
                f"clustering.{name} {value} needs all features in one actor, and bank.num_actors is {self.bank.num_actors}; "
                f"give --bank.num-actors 1 or --clustering.{name} {' or '.join(fitting)}",
            )
        largest = max(self.v2.crop_sizes)
        check(
            self.algorithm != "deepcluster_v2" or largest <= self.images.resize,
            f"v2.crop_sizes {largest} is above images.resize {self.images.resize}; lower the one or raise the other",
        )
        check(
            self.algorithm != "deepcluster_v2" or self.images.decode != "tasks",
            "algorithm deepcluster_v2 cuts several crops of an image, images.decode tasks one; give --images.decode worker",
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
