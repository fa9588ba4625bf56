"""Pretrain a backbone: ``pretrain.py [RECIPE] [--data SHARDS] [--run-dir DIR] [--field value ...]``."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this very copy, also in a job's unpacked working directory

import tyro

from raydc.config import Config, RunError, UsageError
from raydc.recipes import RECIPES

ROWS = (("raw pixels", "_pixels"), ("random init", "_random"), ("trained", ""))
COLUMNS = (
    ("nmi_labels", "NMI at k"),
    ("nmi_classes", "NMI classes"),
    ("knn_top1", "20-NN"),
    ("linear_top1", "linear probe"),
)


def parse(arguments: list[str] | None = None) -> Config:
    recipes = {name: make() for name, make in RECIPES.items()}
    descriptions = {name: make.__doc__ for name, make in RECIPES.items()}
    choice = tyro.extras.subcommand_type_from_defaults(recipes, descriptions, prefix_names=False)
    return tyro.cli(
        choice,
        default=recipes["digits"],
        args=arguments,
        description=__doc__,
        config=(tyro.conf.CascadeSubcommandArgs,),  # without a RECIPE the fields are those of digits
    )


def table(result: dict) -> str:
    """Raw pixels, random init and trained features, one row each."""
    lines = ["", f"{'':<12}" + "".join(f"{title:>14}" for _, title in COLUMNS)]
    for title, suffix in ROWS:
        values = [result["metrics"].get(key + suffix) for key, _ in COLUMNS]
        lines.append(f"{title:<12}" + "".join(f"{'-' if v is None else f'{v:.3f}':>14}" for v in values))
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    try:
        config = parse(arguments)
        from raydc.deepcluster import (
            pretrain,
            run_dir,
        )  # not before the command line is understood: it imports torch and Ray

        result = pretrain(config)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (RunError, OSError) as error:  # OSError: a disk that is full, a place that may not be written
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; the same command goes on where it was", file=sys.stderr)
        return 130
    print(table(result))
    print(f"{run_dir(config).uri}/result.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
