"""What every benchmark is given: a backbone, data, a place to work in; and how a backbone is found.

A backbone is a run directory, a file, or ``random:`` and either of these or a network's name: the same network with fresh
weights, in two variants: with untouched BatchNorm statistics and with statistics adapted to the data. The better counts.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch

from raydc import checkpoint, launch
from raydc import config as configs
from raydc.benchmarks import scorecard
from raydc.benchmarks.options import All, Setting
from raydc.benchmarks.scorecard import Row
from raydc.checkpoint import BACKBONE, tensors_hash
from raydc.config import Config, ModelConfig, UsageError
from raydc.models.backbone import BLOCKS, build_backbone, make_backbone
from raydc.seeding import derive
from raydc.storage import Folder

RANDOM = "random:"
OFFICIAL_SIZE = 224  # pixels, of every published row
LISTED = 5  # keys that an error names before it only counts


def once(
    options: Setting, facts: dict[str, str], measure: Callable[[], list[Row]], *, cpus: int = 0, free: Sequence[str] = ()
) -> list[Row]:
    """The rows that this run directory holds; else what ``measure`` finds, written down. Only that needs Ray.

    ``facts``, ``free``: see ``claim``; ``cpus``: see ``attach``.
    """
    claim(options, facts, others=free)
    if rows := scorecard.read(options.folder):
        print(f"{options.folder.uri} has these figures already", flush=True)
        return rows
    attach(options, cpus)
    rows = measure()
    scorecard.write(options.folder, rows)
    return rows


def attach(options: Setting, cpus: int = 0) -> None:
    """Join Ray, or start it here with at least ``cpus`` CPUs, and see that it has what is asked for."""
    if options.num_workers:
        launch.attach(max(cpus, options.num_workers + launch.SPARE_CPUS), options.verbose)
        launch.check_resources(options.num_workers, options.folder)
        launch.check_resources(options.num_workers, options.features_folder)


def notes(candidate: Candidate, statistics: str, *more: str) -> tuple[str, ...]:
    """What a row says of its backbone; ``statistics``: the variant of fresh weights that was better, if there were two."""
    fresh = f"fresh weights, {statistics} BatchNorm statistics (the better)" if statistics else ""
    size = "" if candidate.size == OFFICIAL_SIZE else f"{candidate.size} px images"
    return tuple(filter(None, (*candidate.notes, fresh, size, *more)))


FREE_TO_CHANGE = ("run_dir", "data", "backbone", "features", "num_workers", "threads", "use_gpu", "max_failures", "verbose")


def claim(setting: Setting | All, facts: dict[str, str], others: Sequence[str] = ()) -> None:
    """Write what this run directory measures, before anything else; UsageError if it measures something else already.

    ``facts`` tell backbone and data apart, wherever they lie; ``others``: further options that may change.
    """
    free = dict.fromkeys((*FREE_TO_CHANGE, *others))
    folder, name = setting.folder, type(setting).__name__.lower()
    if folder.is_file():
        raise UsageError(f"{folder.uri} is a file; give a folder as --run-dir")
    options = {key: value for key, value in configs.to_dict(setting).items() if key not in free}
    here = json.loads(json.dumps({"benchmark": name, "options": options, "facts": facts}))
    if not folder.exists("config.json"):
        folder.write_json("config.json", here | {"setting": configs.to_dict(setting), "versions": launch.versions()})
        return
    there = folder.read_json("config.json")
    changed = [
        (part, key) for part in ("options", "facts") for key in here[part] if there.get(part, {}).get(key) != here[part][key]
    ]
    differing = [
        f"other {key}"  # a fact is a fingerprint, which says nothing to a person
        if part == "facts"
        else f"{key} is {_short(there.get(part, {}).get(key))} there and {_short(here[part][key])} here"
        for part, key in changed
    ]
    differing = [f"it holds {there.get('benchmark', 'a run')}"] if there.get("benchmark") != name else differing
    if differing:
        raise UsageError(f"{folder.uri} belongs to another measurement: {'; '.join(differing)}. Give another --run-dir")


def _short(value) -> str:
    return repr(value)[:40]


@dataclass(frozen=True, kw_only=True, eq=False)
class Candidate:
    """A backbone to be measured. ``size`` and ``resize``: of the images it sees, in pixels.

    ``statistics`` is "" for trained weights; for fresh ones "untouched" or, once they are, "adapted".
    """

    label: str
    model: ModelConfig
    size: int
    resize: int
    tensors: dict[str, torch.Tensor]
    statistics: str = ""
    notes: tuple[str, ...] = field(default=())

    @property
    def is_random(self) -> bool:
        return bool(self.statistics)

    @property
    def name(self) -> str:
        """Of this variant, as a person reads it."""
        return f"{self.label} ({self.statistics} BatchNorm)" if self.is_random else self.label

    @cached_property
    def fingerprint(self) -> str:
        """Of weights, buffers and what happens before the first layer."""
        return tensors_hash(self.tensors, json.dumps(configs.to_dict(self.model)))

    def check_residual(self, task: str) -> None:
        """UsageError for the paper's networks, where the protocol is made for the stages of a residual network."""
        configs.check(
            self.model.architecture in BLOCKS,
            f"{task} needs a residual network and {self.label} is {self.model.architecture}; knn and semisup measure it",
        )

    def build(self) -> torch.nn.Module:
        """The network, in eval mode."""
        backbone = make_backbone(self.model)
        backbone.load_state_dict(self.tensors)
        return backbone.eval()

    def at(self, size: int) -> Candidate:
        """The same backbone looking at images of another size; 0: as it is."""
        return replace(self, size=size, resize=round(size * self.resize / self.size)) if size else self


def open_backbone(spec: str, arch: str = "", seed: int = 0, known: Mapping[str, Candidate] | None = None) -> Candidate:
    """The backbone that ``spec`` names; ``known``: names for random:. UsageError where there is none."""
    if spec.startswith(RANDOM):
        what = spec.removeprefix(RANDOM)
        known = dict(known or {}) | plain_networks()
        like = known[what] if what in known else _trained(what, arch, sorted(known))
        tensors = build_backbone(like.model, derive(seed, "backbone")).state_dict()
        return replace(like, label=spec, tensors=tensors, statistics="untouched", notes=())
    return _trained(spec, arch, None)


def networks(recipes: Mapping[str, Callable[[], Config]]) -> dict[str, Candidate]:
    """The networks of named recipes, without weights."""
    made = {name: make() for name, make in recipes.items()}
    return {
        name: Candidate(label=name, model=one.model, size=one.images.size, resize=one.images.resize, tensors={})
        for name, one in made.items()
    }


def plain_networks() -> dict[str, Candidate]:
    """torchvision's networks at 224 pixels, without weights."""
    return {
        name: Candidate(label=name, model=ModelConfig(architecture=name), size=224, resize=256, tensors={})
        for name in ("resnet18", "resnet34", "resnet50")
    }


def _trained(spec: str, arch: str, names: list[str] | None) -> Candidate:
    folder = Folder(spec)
    if folder.exists(BACKBONE):
        unfinished = () if folder.exists("result.json") else (f"{spec} is not finished: its last epoch so far was measured",)
        return _ours(spec, *checkpoint.read_tensors(folder), arch, notes=unfinished)
    if folder.is_local and folder.is_file():
        return _from_file(spec, Path(folder.root), arch)
    if folder.exists():
        raise UsageError(f"{spec} holds no {BACKBONE}; give a run directory with at least one finished epoch")
    known = f", nor one of {', '.join(names)}" if names else ""
    raise UsageError(f"{spec} is neither a run directory nor a file{known}; check --backbone")


def _from_file(spec: str, path: Path, arch: str) -> Candidate:
    if path.suffix == ".safetensors":
        tensors, metadata = checkpoint.read_tensors(Folder(path.parent), path.name)
        if "model" in metadata:
            return _ours(spec, tensors, metadata, arch)
    else:
        tensors = _torch_file(path)
    if not arch:
        raise UsageError(f"{spec} does not say its architecture; give --arch ({', '.join(plain_networks())})")
    return adopt(spec, tensors, arch)


def _ours(spec: str, tensors: dict, metadata: Mapping[str, str], arch: str, notes: tuple[str, ...] = ()) -> Candidate:
    if "model" not in metadata:
        raise UsageError(f"{spec} does not say its architecture; give a file that raydc wrote, or --arch")
    model = configs.from_dict(ModelConfig, json.loads(metadata["model"]))
    if arch not in ("", model.architecture):
        raise UsageError(f"--arch {arch} contradicts {spec}, which says that it is a {model.architecture}; leave --arch out")
    size, resize = int(metadata["input_size"]), int(metadata["resize"])
    return _checked(Candidate(label=spec, model=model, size=size, resize=resize, tensors=tensors, notes=notes))


def _torch_file(path: Path) -> dict[str, torch.Tensor]:
    """A state dict saved by torch, alone or under ``state_dict`` or ``model``; nothing in the file is executed."""
    try:
        values = torch.load(io.BytesIO(path.read_bytes()), map_location="cpu", weights_only=True)
    except Exception as error:  # whatever torch says to a file that is none of its own
        reason = f"{type(error).__name__}: {str(error).splitlines()[0][:100]}" if str(error) else type(error).__name__
        raise UsageError(f"{path} cannot be read as weights alone ({reason}); save its state dict as safetensors") from None
    for inside in ("state_dict", "model"):
        if isinstance(values, Mapping) and isinstance(values.get(inside), Mapping):
            values = values[inside]
    if not isinstance(values, Mapping) or not all(isinstance(value, torch.Tensor) for value in values.values()):
        raise UsageError(f"{path} holds no state dict (names and tensors); save the backbone's state dict")
    return dict(values)


def adopt(spec: str, tensors: dict[str, torch.Tensor], arch: str) -> Candidate:
    """Weights under torchvision's names, perhaps behind one prefix; what belongs to a head is left out and noted.

    A first convolution of two channels means Sobel, whose fixed filter is ours.
    """
    if arch not in plain_networks():
        raise UsageError(f"--arch {arch} is not known; give {', '.join(plain_networks())}")
    prefix = min((key.removesuffix("conv1.weight") for key in tensors if key.endswith("conv1.weight")), key=len, default="")
    ours = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    heads = [key for key in ours if key.split(".")[0] in ("fc", "head", "neck", "top_layer", "sobel")]
    left_out = heads + [key for key in tensors if not key.startswith(prefix)]
    ours = {key: value for key, value in ours.items() if key not in heads}
    plain = plain_networks()[arch]
    model = replace(plain.model, sobel="conv1.weight" in ours and ours["conv1.weight"].shape[1] == 2)
    fresh = make_backbone(model).state_dict()
    counters = {key: value for key, value in fresh.items() if key.endswith("num_batches_tracked")}  # old files lack them
    notes = (f"left out of {spec}: {', '.join(left_out[:LISTED])}" + " ..." * (len(left_out) > LISTED),) if left_out else ()
    return _checked(replace(plain, label=spec, model=model, tensors=counters | ours, notes=notes))


def _checked(candidate: Candidate) -> Candidate:
    """UsageError where the tensors are not those of the network, naming them."""
    expected = make_backbone(candidate.model).state_dict()
    wrong = {
        "missing": [key for key in expected if key not in candidate.tensors],
        "unexpected": [key for key in candidate.tensors if key not in expected],
        "of another shape": [
            f"{key} {tuple(candidate.tensors[key].shape)} instead of {tuple(value.shape)}"
            for key, value in expected.items()
            if key in candidate.tensors and candidate.tensors[key].shape != value.shape
        ],
    }
    found = [f"{len(keys)} {what}: {', '.join(keys[:LISTED])}" for what, keys in wrong.items() if keys]
    if found:
        raise UsageError(
            f"{candidate.label} does not fit {candidate.model.architecture} ({'; '.join(found)}); check --arch or the file"
        )
    return candidate
