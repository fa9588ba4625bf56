"""The options of each benchmark, checked before anything slow is imported; the string under each field documents it."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Literal, get_args

from raydc.config import check
from raydc.storage import Folder

Layer = Literal["feature1", "feature2", "feature3", "feature4", "feature5"]
LAYERS: tuple[Layer, ...] = get_args(Layer)
AVGPOOL = "AvgPool"


@dataclass(frozen=True, kw_only=True)
class Common:
    """The options of every benchmark, and of all together."""

    backbone: str
    """RUN (a run directory), FILE (with --arch, unless raydc wrote it), random:RUN, random:FILE or random:ARCH."""
    run_dir: str
    """Where scorecard.json and everything else go: a local path, s3:// or gs://."""
    arch: str = ""
    """Network of a FILE from elsewhere: resnet18, resnet34, resnet50."""
    features: str = ""
    """Folder of extracted features, shared by benchmarks. Default: features, beside the run directory (of all: inside)."""
    size: int = 0
    """Side of the images the backbone is given, in pixels; 0: what it was trained with."""
    seed: int = 0
    """Where every random number begins."""
    num_workers: int = 1
    """Processes that train or extract; 0 does all in this one, without Ray, for debugging."""
    threads: int = 0
    """CPU threads of a worker; 0: the node's CPUs shared by its workers. On a busy machine 1 is far faster."""
    use_gpu: Literal["auto", "yes", "no"] = "auto"
    """Whether each worker takes a GPU; auto: if there are enough."""
    max_failures: int = 3
    """Times it starts again after a worker died."""
    verbose: bool = False
    """Let Ray talk."""

    def __post_init__(self) -> None:
        for name in ("seed", "num_workers", "threads", "max_failures", "size"):
            self._at_least(name, 0)

    def _at_least(self, name: str, least: int) -> None:
        check(getattr(self, name) >= least, f"{name} is {getattr(self, name)}; give {least} or more")

    def _positive(self, *names: str) -> None:
        for name in names:
            check(getattr(self, name) > 0, f"{name} is {getattr(self, name)}; give a positive number")

    def _whole_batches(self) -> None:
        size, workers = self.batch_size, self.num_workers
        check(size % max(1, workers) == 0, f"batch_size {size} is not a multiple of num_workers {workers}; change one")

    @property
    def folder(self) -> Folder:
        return Folder(self.run_dir)


@dataclass(frozen=True, kw_only=True)
class Setting(Common):
    """The options of every single benchmark."""

    data: str
    """What is measured on; the table in README.md says what each benchmark reads."""
    deterministic: bool = False
    """Two runs agree bit for bit on a GPU too (cuDNN deterministic, no autotuning); on CPUs they do, where the images fit
    into memory."""

    @property
    def features_folder(self) -> Folder:
        return Folder(self.features) if self.features else self.folder.sibling("features")


@dataclass(frozen=True, kw_only=True)
class Linear(Setting):
    """Linear classifiers on feature1..feature5 and AvgPool of the frozen backbone. --data: shards with labels."""

    preset: Literal["imagenet", "places205", "inat18"] = "imagenet"
    """Whose epochs, steps and augmentation."""
    epochs: int = 0
    """Epochs, with the preset's steps in proportion; 0: the preset's (imagenet: 90, AvgPool 100)."""
    batch_size: int = 256
    """Images in a step, over all workers."""
    heads: tuple[Literal["feature1", "feature2", "feature3", "feature4", "feature5", "AvgPool"], ...] = (*LAYERS, AVGPOOL)
    """The classifiers that are trained."""
    eval_every: int = 1
    """Epochs between two looks at val; AvgPool's figure is the best of them, as published, a layer's the last."""
    augment: bool = True
    """--no-augment: AvgPool alone, by logistic regression on features that are extracted once (no published protocol)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("epochs", 0), ("batch_size", 1), ("eval_every", 1)):
            self._at_least(name, least)
        check(bool(self.heads), f"heads is empty; give some of {', '.join((*LAYERS, AVGPOOL))}")
        self._whole_batches()


@dataclass(frozen=True, kw_only=True)
class Knn(Setting):
    """Weighted k-nearest neighbours on the frozen feature. --data: shards with labels."""

    neighbours: tuple[int, ...] = (10, 20, 100, 200)
    """Numbers of neighbours that vote."""
    temperature: float = 0.07
    """A vote weighs exp(cosine similarity / temperature)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(
            bool(self.neighbours) and min(self.neighbours) > 0, f"neighbours is {self.neighbours}; give numbers of 1 or more"
        )
        self._positive("temperature")


@dataclass(frozen=True, kw_only=True)
class Svm(Setting):
    """Linear SVMs on feature1..feature5 with all labels of VOC07. --data: a VOC2007 folder."""

    layers: tuple[Layer, ...] = LAYERS
    """The layers that are measured; the best one is named."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(bool(self.layers), f"layers is empty; give some of {', '.join(LAYERS)}")


@dataclass(frozen=True, kw_only=True)
class Lowshot(Setting):
    """Linear SVMs with k positives a class of VOC07. --data: a VOC2007 folder."""

    layer: Layer = "feature5"
    """The layer that is measured; the page takes the best one of svm."""
    shots: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 96)
    """Positives of a class; each with 19 times as many negatives."""
    num_samples: int = 5
    """Draws for each number of shots; their mean counts."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(bool(self.shots) and min(self.shots) > 0, f"shots is {self.shots}; give numbers of 1 or more")
        self._at_least("num_samples", 1)


@dataclass(frozen=True, kw_only=True)
class Semisup(Setting):
    """Fine-tune the backbone with a part of the labels. --data: shards with labels; writes a backbone too."""

    fraction: float = 0.01
    """Share of the labels, the same of each class (at least one image), drawn by the seed; 1: all. --list goes before it."""
    list: str = ""
    """File with the names of the labelled images, one a line (the official 1 % and 10 % lists); instead of the fraction."""
    lr: float = 0.01
    """Learning rate of the backbone; the page's grid has .1, .01 and .001."""
    head_factor: float = 1.0
    """Learning rate of the head over the backbone's; the page's grid has 1, 10 and 100."""
    epochs: int = 0
    """Epochs, with the steps in proportion; 0: 20."""
    batch_size: int = 256
    """Images in a step, over all workers."""
    weight_decay: float = -1.0
    """-1: the protocol's, 5e-4 with 1 % of the labels, else 1e-4."""
    eval_every: int = 5
    """Epochs between two looks at val; the figure is the last epoch's."""

    def __post_init__(self) -> None:
        super().__post_init__()
        good = bool(self.list) or 0 < self.fraction <= 1
        check(good, f"fraction is {self.fraction}; give a share above 0 and at most 1")
        self._positive("lr", "head_factor", "batch_size", "eval_every")
        self._at_least("epochs", 0)
        self._whole_batches()


def trial_name(lr: float, head_factor: float) -> str:
    """As the page names its nine files: lr1e-2_head10."""
    exponent = math.floor(math.log10(lr))
    return f"lr{lr / 10**exponent:.10g}e{exponent}_head{head_factor:.10g}"


@dataclass(frozen=True, kw_only=True)
class Sweep(Semisup):
    """The page's grid of semisup: base rate {.1, .01, .001} x head factor {1, 10, 100}. --data: shards with labels."""

    lr: tuple[float, ...] = (1e-1, 1e-2, 1e-3)
    """Learning rates of the backbone."""
    head_factor: tuple[float, ...] = (1, 10, 100)
    """Learning rates of the head over the backbone's."""
    num_workers: int = 0
    """Training workers of a trial; 0: each trial trains in its own process, on one GPU or cpus_per_trial CPUs."""
    cpus_per_trial: int = 1
    """CPUs, and threads, of a trial that trains in its own process."""
    max_concurrent: int = 0
    """Trials at once; 0: as many as the cluster holds."""
    asha: bool = False
    """Stop the worse trials early (ASHA)."""

    def __post_init__(self) -> None:
        for name in ("lr", "head_factor"):
            values = getattr(self, name)
            check(bool(values) and min(values) > 0, f"{name} is {values}; give positive numbers")
            check(len(set(values)) == len(values), f"{name} is {values}; give each number once")
        self._at_least("cpus_per_trial", 1)
        self._at_least("max_concurrent", 0)
        self.trial(*self.grid[0])  # what every trial checks

    @property
    def grid(self) -> list[tuple[float, float]]:
        """Every pair of a rate and a head factor."""
        return [(lr, factor) for lr in self.lr for factor in self.head_factor]

    def trial(self, lr: float, head_factor: float) -> Semisup:
        """The options of one point of the grid; it has a run directory of its own."""
        run_dir = self.folder.place(f"trials/{trial_name(lr, head_factor)}")
        given = {field.name: getattr(self, field.name) for field in fields(Semisup)}
        threads = self.threads or (self.cpus_per_trial if self.num_workers == 0 else 0)
        more = {"eval_every": 1} if self.num_workers or self.asha else {}  # Tune hears of every epoch
        return Semisup(**given | more | {"lr": lr, "head_factor": head_factor, "run_dir": run_dir, "threads": threads})


@dataclass(frozen=True, kw_only=True)
class Dense(Setting):
    """What detection and segmentation have in common: training by iterations, in rounds with a commit after each."""

    max_iters: int = 0
    """Iterations of training, with warmup and steps in proportion; 0: the preset's."""
    batch_size: int = 0
    """Images in an iteration, over all workers; 0: the preset's."""
    micro_batch: int = 0
    """Images a worker sends through the network at once; gradients accumulate to the batch. 0: the whole batch."""
    lr: float = 0.0
    """Learning rate; 0: the preset's, for the preset's batch size (nothing is scaled)."""
    rounds: int = 0
    """Parts of the training; after each one a start that was killed goes on. 0: the preset's."""
    eval_every: int = 0
    """Rounds between two looks at the test images; 0: only after the last, whose figures count in any case."""
    trials: int = 1
    """Times it is trained and measured, each with a seed of its own; the mean counts."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("max_iters", "batch_size", "micro_batch", "lr", "rounds", "eval_every"):
            self._at_least(name, 0)
        self._at_least("trials", 1)
        check(not self.size, f"size {self.size} means nothing here; detection has --min-size and segmentation --crop-size")
        check(
            not self.deterministic or self.use_gpu == "no",
            "deterministic: pooling of regions and upsampling have no such form on a GPU; give --use-gpu no with it",
        )

    def _preset_or(self, name: str, least: int, most: float = math.inf) -> None:
        value, good = getattr(self, name), f"{least} to {most}" if most < math.inf else f"{least} or more"
        check(value == 0 or least <= value <= most, f"{name} is {value}; give {good}, or 0 for the preset's")


@dataclass(frozen=True, kw_only=True)
class Detection(Dense):
    """Train an object detector from the backbone. --data: the folder of VOC2007 and VOC2012, or COCO's root."""

    preset: Literal["voc0712_faster_rcnn_c4", "coco_mask_rcnn_fpn_1x"]
    """Whose data, network and schedule."""
    min_size: int = 0
    """Short side of the test images, in pixels, with the training sizes in proportion; 0: the preset's 800."""
    regions: int = 0
    """Regions of an image that the heads learn from, and half of those that are tested; 0: the preset's 512 and 1,000."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._preset_or("min_size", 64)  # below it no anchor lies inside an image
        self._preset_or("regions", 4, 511)


@dataclass(frozen=True, kw_only=True)
class Segmentation(Dense):
    """Train a segmentation network from the backbone. --data: VOC2012, the Cityscapes root, or camvid."""

    preset: Literal["voc12aug_fcn_20k", "cityscapes_fcn_40k", "camvid_fcn"]
    """Whose data, network and schedule."""
    crop_size: int = 0
    """Side of the training crops, in pixels, with the images' sizes in proportion; 0: the preset's."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._preset_or("crop_size", 32)


@dataclass(frozen=True, kw_only=True)
class All(Common):
    """Every benchmark that the given data allow, and the page's tables. --data: shards, a VOC2007 folder, or both."""

    data: tuple[str, ...]
    """Shards (linear, knn, semisup) and VOC2007 folders (svm, lowshot)."""
    preset: Literal["imagenet", "places205", "inat18"] = "imagenet"
    """Of linear."""
    epochs: int = 0
    """Epochs of linear; 0: the preset's."""
    fractions: tuple[float, ...] = (0.01, 0.1)
    """Shares of the labels that semisup learns from, at the setting of the published DeepCluster row (lr .01, head x 1)."""
    lists: tuple[str, ...] = ()
    """Files with names of labelled images for semisup (the official 1 % and 10 % lists), instead of the fractions."""
