"""Pretrain a backbone."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import field, make_dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this very copy, also in a job's unpacked working directory

import tyro

from raydc import commandline
from raydc.config import Config, UsageError
from raydc.recipes import RECIPES

HELP = """Pretrain a backbone: extract, cluster, reassign, train.
  pretrain.py                          the recipe digits: no data, a minute on a laptop
  pretrain.py cifar10_resnet18 --data SHARDS --run-dir DIR --train.epochs 20

SHARDS is a folder made by make_shards.py. Below are the fields and what RECIPE sets them to. The recipes:
"""
ROWS = (("raw pixels", "_pixels"), ("random init", "_random"), ("trained", ""))
COLUMNS = (
    ("nmi_labels", "NMI at k"),
    ("nmi_classes", "NMI classes"),
    ("knn_top1", "20-NN"),
    ("linear_top1", "linear probe"),
)
NO_FIELD = tyro.conf.Suppress[tyro.conf.Fixed[str]]
# Config as the command line offers it: the recipe is the first word, not a field.
Fields = make_dataclass("Fields", [("recipe", NO_FIELD, field(default=""))], bases=(Config,), frozen=True, kw_only=True)


def parse(arguments: list[str] | None = None) -> Config:
    arguments = sys.argv[1:] if arguments is None else arguments
    name, arguments = commandline.take_name(arguments, RECIPES, "recipe", default="digits")
    if any(one.partition("=")[0] == "--recipe" for one in arguments):
        raise UsageError("--recipe is no field: the recipe is the first word, as in pretrain.py cifar10_resnet18 --seed 1")
    fields = commandline.parse(
        Fields,
        arguments,
        default=Fields(**_values(RECIPES[name]())),
        prog="pretrain.py [RECIPE]",
        description=HELP + "\n".join(f"  {recipe:<24}{make.__doc__.splitlines()[0]}" for recipe, make in RECIPES.items()),
        names=RECIPES,
    )
    return Config(**_values(fields))


def _values(config: Config) -> dict:
    return {spec.name: getattr(config, spec.name) for spec in dataclasses.fields(Config)}


def table(result: dict) -> str:
    """Raw pixels, random init and trained features, one row each."""
    lines = ["", f"{'':<12}" + "".join(f"{title:>14}" for _, title in COLUMNS)]
    for title, suffix in ROWS:
        values = [result["metrics"].get(key + suffix) for key, _ in COLUMNS]
        lines.append(f"{title:<12}" + "".join(f"{'-' if v is None else f'{v:.3f}':>14}" for v in values))
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    return commandline.run(lambda: _job(arguments), again="the same command goes on where it was")


def _job(arguments: list[str] | None) -> None:
    config = parse(arguments)
    from raydc.family import pretrain, run_dir  # not before the command line is understood: torch and Ray are slow

    print(table(pretrain(config)))
    print(run_dir(config).place("result.json"))


if __name__ == "__main__":
    sys.exit(main())
