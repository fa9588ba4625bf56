"""The options of each benchmark, checked before anything slow is imported; the string under each field documents it."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from raydc.config import UsageError
from raydc.storage import Folder

LAYERS = ("feature1", "feature2", "feature3", "feature4", "feature5")
AVGPOOL = "AvgPool"


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise UsageError(message)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """The options of every benchmark."""

    backbone: str
    """RUN (a run directory), FILE (with --arch, unless raydc wrote it), random:RUN, random:FILE or random:ARCH."""
    data: str
    """What is measured on; the table in README.md says what each benchmark reads."""
    run_dir: str
    """Where scorecard.json and everything else of this benchmark go: a local path, s3:// or gs://."""
    arch: str = ""
    """Network of a FILE from elsewhere: resnet18, resnet34, resnet50."""
    features: str = ""
    """Folder of extracted features, shared by benchmarks. Default: features, beside the run directory."""
    size: int = 0
    """Side of the images the backbone is given, in pixels; 0: what it was trained with."""
    seed: int = 0
    """Where every random number begins."""
    num_workers: int = 1
    """Processes that train or extract; 0 does all in this one, without Ray, for debugging."""
    threads: int = 0
    """CPU threads of a worker; 0: the node's CPUs shared by its workers."""
    use_gpu: Literal["auto", "yes", "no"] = "auto"
    """Whether each worker takes a GPU; auto: if there are enough."""
    deterministic: bool = False
    """Two runs agree bit for bit on a GPU too (cuDNN deterministic, no autotuning); on CPUs they do, where the images fit
    into memory."""
    max_failures: int = 3
    """Times it starts again after a worker died."""
    verbose: bool = False
    """Let Ray talk."""

    def __post_init__(self) -> None:
        for name in ("seed", "num_workers", "threads", "max_failures", "size"):
            if getattr(self, name) < 0:
                raise UsageError(f"{name} is {getattr(self, name)}; give 0 or more")

    @property
    def folder(self) -> Folder:
        return Folder(self.run_dir)

    @property
    def features_folder(self) -> Folder:
        if self.features:
            return Folder(self.features)
        return self.folder.sibling("features")


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
            if getattr(self, name) < least:
                raise UsageError(f"{name} is {getattr(self, name)}; give {least} or more")
        if not self.heads:
            raise UsageError(f"heads is empty; give some of {', '.join((*LAYERS, AVGPOOL))}")
        if self.batch_size % max(1, self.num_workers):
            raise UsageError(f"batch_size {self.batch_size} is not a multiple of num_workers {self.num_workers}; change one")


@dataclass(frozen=True, kw_only=True)
class Knn(Setting):
    """Weighted k-nearest neighbours on the frozen feature. --data: shards with labels."""

    neighbours: tuple[int, ...] = (10, 20, 100, 200)
    """Numbers of neighbours that vote."""
    temperature: float = 0.07
    """A vote weighs exp(cosine similarity / temperature)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.neighbours or min(self.neighbours) < 1:
            raise UsageError(f"neighbours is {self.neighbours}; give numbers of 1 or more")
        if self.temperature <= 0:
            raise UsageError(f"temperature is {self.temperature}; give a positive number")


@dataclass(frozen=True, kw_only=True)
class Svm(Setting):
    """Linear SVMs on feature1..feature5 with all labels of VOC07. --data: a VOC2007 folder."""

    layers: tuple[Literal["feature1", "feature2", "feature3", "feature4", "feature5"], ...] = LAYERS
    """The layers that are measured; the best one is named."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(bool(self.layers), f"layers is empty; give some of {', '.join(LAYERS)}")


@dataclass(frozen=True, kw_only=True)
class Lowshot(Setting):
    """Linear SVMs with k positives a class of VOC07. --data: a VOC2007 folder."""

    layer: Literal["feature1", "feature2", "feature3", "feature4", "feature5"] = "feature5"
    """The layer that is measured; the page takes the best one of svm."""
    shots: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 96)
    """Positives of a class; each with 19 times as many negatives."""
    num_samples: int = 5
    """Draws for each number of shots; their mean counts."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(bool(self.shots) and min(self.shots) > 0, f"shots is {self.shots}; give numbers of 1 or more")
        _check(self.num_samples > 0, f"num_samples is {self.num_samples}; give 1 or more")


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
        if not self.list and not 0 < self.fraction <= 1:
            raise UsageError(f"fraction is {self.fraction}; give a share above 0 and at most 1")
        for name in ("lr", "head_factor", "batch_size", "eval_every"):
            if getattr(self, name) <= 0:
                raise UsageError(f"{name} is {getattr(self, name)}; give a positive number")
        if self.epochs < 0:
            raise UsageError(f"epochs is {self.epochs}; give 0 or more")
        if self.batch_size % max(1, self.num_workers):
            raise UsageError(f"batch_size {self.batch_size} is not a multiple of num_workers {self.num_workers}; change one")


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
            _check(bool(values) and min(values) > 0, f"{name} is {values}; give positive numbers")
            _check(len(set(values)) == len(values), f"{name} is {values}; give each number once")
        _check(self.cpus_per_trial > 0, f"cpus_per_trial is {self.cpus_per_trial}; give 1 or more")
        _check(self.max_concurrent >= 0, f"max_concurrent is {self.max_concurrent}; give 0 or more")
        self.trial(self.lr[0], self.head_factor[0], self.run_dir)  # what every trial checks

    def trial(self, lr: float, head_factor: float, run_dir: str) -> Semisup:
        """The options of one point of the grid."""
        given = {field.name: getattr(self, field.name) for field in fields(Semisup)}
        threads = self.threads or (self.cpus_per_trial if self.num_workers == 0 else 0)
        more = {"eval_every": 1} if self.num_workers or self.asha else {}  # Tune hears of every epoch
        return Semisup(**given | more | {"lr": lr, "head_factor": head_factor, "run_dir": run_dir, "threads": threads})


@dataclass(frozen=True, kw_only=True)
class All:
    """Every benchmark that the given data allow, and the page's tables. --data: shards, a VOC2007 folder, or both."""

    backbone: str
    """RUN (a run directory), FILE (with --arch, unless raydc wrote it), random:RUN, random:FILE or random:ARCH."""
    data: tuple[str, ...]
    """Shards (linear, knn, semisup) and VOC2007 folders (svm, lowshot)."""
    run_dir: str
    """Where a folder for each benchmark and the common scorecard.json go."""
    arch: str = ""
    """Network of a FILE from elsewhere: resnet18, resnet34, resnet50."""
    preset: Literal["imagenet", "places205", "inat18"] = "imagenet"
    """Of linear."""
    epochs: int = 0
    """Epochs of linear; 0: the preset's."""
    fractions: tuple[float, ...] = (0.01, 0.1)
    """Shares of the labels that semisup learns from, at the setting of the published DeepCluster row (lr .01, head x 1)."""
    lists: tuple[str, ...] = ()
    """Files with names of labelled images for semisup (the official 1 % and 10 % lists), instead of the fractions."""
    size: int = 0
    """Side of the images the backbone is given, in pixels; 0: what it was trained with."""
    seed: int = 0
    """Where every random number begins."""
    num_workers: int = 1
    """Processes that train or extract; 0 does all in this one, without Ray, for debugging."""
    threads: int = 0
    """CPU threads of a worker; 0: the node's CPUs shared by its workers. On a busy machine 1 is far faster."""
    features: str = ""
    """Folder of extracted features. Default: features, inside the run directory."""
    use_gpu: Literal["auto", "yes", "no"] = "auto"
    """Whether each worker takes a GPU; auto: if there are enough."""
    verbose: bool = False
    """Let Ray talk."""

    @property
    def folder(self) -> Folder:
        return Folder(self.run_dir)
