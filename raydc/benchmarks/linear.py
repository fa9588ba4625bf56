"""Linear evaluation: linear classifiers on pooled feature1..feature5, and one on the average pool (protocols 3, 4).

The backbone is frozen, in eval mode, its BatchNorms folded; all heads learn in one pass over the data. Where the protocol
jitters colours for the five heads and not for AvgPool, both kinds of pixels come from the same crop.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import numpy as np
import torch
from torch import nn

from raydc.benchmarks.features import GRIDS, extract, pool, variants
from raydc.benchmarks.learner import LabelledShards, Learner, fit, open_job, open_shards, scaled
from raydc.benchmarks.options import AVGPOOL, Linear
from raydc.benchmarks.published import OFFICIAL
from raydc.benchmarks.scorecard import Row
from raydc.benchmarks.setting import OFFICIAL_SIZE, Candidate, notes, once
from raydc.config import ImagesConfig, TrainConfig
from raydc.data import transforms
from raydc.launch import Job
from raydc.models.backbone import Backbone
from raydc.models.norm import folded
from raydc.optim import learning_rate
from raydc.probe import linear_top1
from raydc.remote import Shared
from raydc.seeding import derive

JITTER = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "lighting": 0.1}


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A published protocol. ``jitter``: colours of what the five heads see."""

    layers: TrainConfig
    avgpool: TrainConfig
    crop: Literal["resized", "square"]
    jitter: dict[str, float]
    note: str = ""


def _steps(epochs: int, *milestones: float, **more) -> TrainConfig:
    return TrainConfig(epochs=epochs, batch_size=256, schedule="step", milestones=milestones, **more)


LAYERS_SGD = {"lr": 0.01, "weight_decay": 1e-4, "nesterov": True}
AVGPOOL_SGD = {"lr": 30.0, "weight_decay": 0.0}
OUR_CHOICE = "AvgPool has no published config for this data: ImageNet's settings with this data's epochs, our choice"
PRESETS = {
    "imagenet": Preset(
        layers=_steps(90, 30, 60, 90, **LAYERS_SGD),
        avgpool=_steps(100, 60, 80, **AVGPOOL_SGD),
        crop="resized",
        jitter=JITTER,
    ),
    "places205": Preset(
        layers=_steps(28, 7, 14, 21, **LAYERS_SGD),
        avgpool=_steps(28, 7, 14, 21, **AVGPOOL_SGD),
        crop="square",
        jitter={},
        note=OUR_CHOICE,
    ),
    "inat18": Preset(
        layers=_steps(84, 24, 48, 72, **LAYERS_SGD),
        avgpool=_steps(84, 24, 48, 72, **AVGPOOL_SGD),
        crop="resized",
        jitter={},
        note=OUR_CHOICE,
    ),
}


# --- the network --------------------------------------------------------------------------------------------------------


class Heads(nn.Module):
    """A linear classifier for each name; behind feature1..feature5 a BatchNorm without affine part on the pooled map."""

    def __init__(self, channels: dict[str, int], names: tuple[str, ...], num_classes: int, seed: int) -> None:
        super().__init__()
        layers = [name for name in names if name != AVGPOOL]
        self.norms = nn.ModuleDict({name: nn.BatchNorm2d(channels[name], affine=False) for name in layers})
        dims = {name: channels[name] * GRIDS.get(name, 1) ** 2 for name in names}
        self.classifiers = nn.ModuleDict({name: nn.Linear(dims[name], num_classes) for name in names})
        for name, classifier in self.classifiers.items():  # N(0, .01) and 0, whichever other heads there are
            generator = torch.Generator().manual_seed(derive(seed, "head", name))
            nn.init.normal_(classifier.weight, 0, 0.01, generator=generator)
            nn.init.zeros_(classifier.bias)

        self.learning = names

    def finish_layers(self) -> None:
        """From here on AvgPool learns alone, and the others cost nothing."""
        self.learning = (AVGPOOL,)
        for name in self.norms:
            self.classifiers[name].requires_grad_(False)

    def forward(self, features: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        flat = {name: self.norms[name](features[name]).flatten(1) for name in self.learning if name != AVGPOOL}
        flat |= {AVGPOOL: features[AVGPOOL]} if AVGPOOL in features else {}
        return {name: self.classifiers[name](flat[name]) for name in self.learning}


class Probe(nn.Module):
    """Frozen backbone and heads. Pixels are (B, 3, S, S), or (B, 6, S, S): plain ones, then jittered ones."""

    def __init__(self, backbone: Backbone, heads: Heads) -> None:
        super().__init__()
        self.backbone, self.heads = folded(backbone).requires_grad_(False), heads

    def train(self, mode: bool = True) -> Probe:
        super().train(mode)
        self.backbone.eval()
        return self

    @torch.no_grad()
    def features(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        plain, jittered = pixels[:, :3], pixels[:, -3:]
        features, layers = {}, self.heads.learning != (AVGPOOL,)
        if layers:
            maps = self.backbone.taps(jittered)
            features = pool({name: value.float() for name, value in maps.items()})
        if AVGPOOL in self.heads.learning:
            shared = layers and pixels.shape[1] == 3
            features[AVGPOOL] = maps["feature5"].mean((2, 3)) if shared else self.backbone(plain)
        return features

    def forward(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        features = self.features(pixels)
        with torch.autocast(pixels.device.type, enabled=False):  # heads in fp32, as in the references
            return self.heads({name: value.float() for name, value in features.items()})


def channels(backbone: Backbone) -> dict[str, int]:
    """Of feature1..feature5, and of the average pool."""
    with torch.no_grad():
        maps = backbone.taps(torch.zeros(1, 3, 64, 64))
    return {name: value.shape[1] for name, value in maps.items()} | {AVGPOOL: backbone.feature_dim}


def summed_cross_entropy(outputs: dict[str, torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
    """Unweighted: the heads share no parameter, so each learns as if it were alone."""
    return sum(nn.functional.cross_entropy(scores.float(), labels) for scores in outputs.values())


# --- on a worker --------------------------------------------------------------------------------------------------------


def loop(job: Job) -> dict | None:
    """Train all heads; rank 0 returns {"figures": {head: figure}, "note": on BatchNorm}."""
    learner = Learner(job)
    options: Linear = job.extras["options"]
    preset, candidate = job.extras["preset"], job.extras["candidate"].get()
    backbone = candidate.build()
    heads = Heads(channels(backbone), options.heads, job.extras["num_classes"], derive(options.seed, "linear"))
    heads, note = learner.synchronised(heads)
    probe = Probe(backbone, heads)
    learner.hold(probe, heads, lambda: build_optimizer(heads, preset))
    jitter = replace(job.config.images, **preset.jitter) if preset.jitter and heads.norms else None
    for epoch in learner.state.remaining(job.config.train.epochs):
        if epoch >= preset.layers.epochs and heads.learning != (AVGPOOL,):
            heads.finish_layers()
            learner.trained, jitter = learner.worker.wrap(probe), None  # anew: it expects a gradient of whatever learns
        learner.train(
            epoch,
            change=partial(with_jitter, config=jitter) if jitter else None,
            criterion=summed_cross_entropy,
            set_rate=lambda optimizer, now: set_rates(optimizer, preset, now),
        )
        if is_due(epoch + 1, options.eval_every, preset):
            learner.evaluate(epoch, heads.learning)
        learner.commit(epoch, {})
    return {"figures": figures(learner.journal, options.heads, preset), "note": note} if learner.worker.is_first else None


def build_optimizer(heads: Heads, preset: Preset) -> torch.optim.SGD:
    """One group for the five layers, one for AvgPool, each with its protocol's settings."""
    groups = []
    for part, config in (("layers", preset.layers), (AVGPOOL, preset.avgpool)):
        chosen = [c for name, c in heads.classifiers.items() if (name == AVGPOOL) == (part == AVGPOOL)]
        parameters = [p for classifier in chosen for p in classifier.parameters()]
        if parameters:
            facts = {"momentum": config.momentum, "weight_decay": config.weight_decay, "nesterov": config.nesterov}
            groups.append({"params": parameters, "part": part, "lr": config.lr, **facts})
    return torch.optim.SGD(groups, lr=0.0, momentum=0.9)


def set_rates(optimizer: torch.optim.Optimizer, preset: Preset, epoch: float) -> None:
    """Each group by its own schedule; 0 once its epochs are over, while the other group goes on."""
    for group in optimizer.param_groups:
        config = preset.avgpool if group["part"] == AVGPOOL else preset.layers
        group["lr"] = learning_rate(config, epoch) if epoch < config.epochs else 0.0


def with_jitter(batches: Iterator, seed: int, config: ImagesConfig) -> Iterator:
    """(image_ids, plain pixels) -> (image_ids, plain and jittered pixels): the same crop twice."""
    for ids, pixels in batches:
        sizes = np.full(len(ids), config.size), np.full(len(ids), config.size)
        drawn = transforms.draw_augmentation(config, seed, ids, np.zeros(len(ids), np.int64), *sizes)
        yield ids, torch.cat([pixels.float(), transforms.augment(pixels, drawn, config)], 1)


def is_due(done: int, every: int, preset: Preset) -> bool:
    """Whether val is looked at after ``done`` epochs: at each protocol's end in any case."""
    return done % every == 0 or done in (preset.layers.epochs, preset.avgpool.epochs)


def figures(journal, heads: tuple[str, ...], preset: Preset) -> dict[str, float]:
    """A layer's last epoch, AvgPool's best one, as the references report them."""
    looks = [line for line in journal.lines if line["phase"] == "evaluate"]
    last = next(line for line in looks if line["epoch"] + 1 == preset.layers.epochs or line is looks[-1])
    best = max((line.get(f"{AVGPOOL} top1", 0.0) for line in looks if line["epoch"] < preset.avgpool.epochs), default=0.0)
    return {name: best if name == AVGPOOL else last[f"{name} top1"] for name in heads}


# --- the benchmark ------------------------------------------------------------------------------------------------------


def run(options: Linear, candidate: Candidate) -> list[Row]:
    """The rows of the scorecard; for fresh weights the better of both variants, head by head."""
    candidate.check_residual("linear")
    data = open_shards(options.data)
    published = PRESETS[options.preset]
    size = {"batch_size": options.batch_size}
    preset = replace(
        published,
        layers=replace(scaled(published.layers, options.epochs), **size),
        avgpool=replace(scaled(published.avgpool, options.epochs), **size),
    )

    def measure() -> list[Row]:
        found = variants(options, candidate, data.images("train"))
        if not options.augment:
            return [_without_augmentation(options, candidate, data, found)]
        results = {variant.statistics: _measure(options, preset, variant, data) for variant in found}
        return _rows(options, published, candidate, data, results)

    return once(options, {"backbone": candidate.fingerprint, "data": data.fingerprint}, measure)


def _measure(options: Linear, preset: Preset, candidate: Candidate, data: LabelledShards) -> dict:
    run_dir = options.folder.child(candidate.statistics) if candidate.is_random else options.folder
    print(f"linear ({options.preset}) of {candidate.name} on {data.describe()}", flush=True)
    longest = max((preset.layers, preset.avgpool), key=lambda train: train.epochs)
    if AVGPOOL not in options.heads:
        longest = preset.layers
    job = open_job(
        options,
        data,
        run_dir,
        model=candidate.model,
        images=ImagesConfig(size=candidate.size, resize=candidate.resize, crop=preset.crop),
        train=longest,
        extras={
            "options": options,
            "preset": preset,
            "candidate": Shared(candidate, local=options.num_workers == 0),
            "num_classes": data.num_classes,
        },
    )
    return fit(loop, job, options)


def _rows(options: Linear, published: Preset, candidate: Candidate, data: LabelledShards, results: dict) -> list[Row]:
    changed = [f"{options.epochs} epochs instead of {published.layers.epochs}"] if options.epochs else []
    changed += [f"batches of {options.batch_size}"] if options.batch_size != published.layers.batch_size else []
    full = data.has(OFFICIAL[options.preset]) and candidate.size == OFFICIAL_SIZE and not changed
    rows = []
    for head in options.heads:
        statistics, best = max(results.items(), key=lambda item: item[1]["figures"][head])
        chosen = (published.note, "best epoch on val, as published") if head == AVGPOOL else ()
        rows.append(
            Row(
                benchmark=f"linear_{options.preset}",
                column=head,
                value=round(best["figures"][head], 2),
                data=data.describe(),
                backbone=candidate.label,
                full=full,
                notes=notes(candidate, statistics, best["note"], *changed, *chosen),
            )
        )
    return rows


def _without_augmentation(options: Linear, candidate: Candidate, data: LabelledShards, found: list[Candidate]) -> Row:
    """Logistic regression on the features that kNN uses too."""
    tops = {}
    for variant in found:
        split = {name: extract(options, variant, data.images(name), "avgpool").load("avgpool") for name in ("train", "val")}
        known = {name: data.labels[name] >= 0 for name in split}
        pairs = [part[known[name]] for name in split for part in (split[name], data.labels[name])]
        tops[variant.statistics] = 100 * linear_top1(*pairs)
    statistics = max(tops, key=tops.get)
    how = "logistic regression on cached features, no augmentation: no published protocol"
    return Row(
        benchmark="linear_cached",
        column=AVGPOOL,
        value=round(tops[statistics], 2),
        data=data.describe(),
        backbone=candidate.label,
        notes=notes(candidate, statistics, how),
    )
