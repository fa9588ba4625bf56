"""Measure a backbone."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this very copy, also in a job's unpacked working directory

from raydc import commandline
from raydc.benchmarks import options
from raydc.config import UsageError
from raydc.recipes import RECIPES

BENCHMARKS = {
    "linear": options.Linear,
    "knn": options.Knn,
    "svm": options.Svm,
    "lowshot": options.Lowshot,
    "semisup": options.Semisup,
    "detection": options.Detection,
    "segmentation": options.Segmentation,
    "all": options.All,
}
HELP = """Measure a backbone: benchmark.py NAME --backbone B --data PATH --run-dir DIR
  benchmark.py knn --backbone runs/cifar10_resnet18 --data SHARDS --run-dir runs/knn
  benchmark.py svm --backbone random:resnet50 --data VOCdevkit/VOC2007 --run-dir runs/svm_random

The benchmarks:
"""


def parse(arguments: list[str] | None = None) -> options.Setting | options.All:
    arguments = sys.argv[1:] if arguments is None else arguments
    wants_help = not arguments or arguments[0] in ("-h", "--help")
    summary = HELP + "\n".join(f"  {name:<14}{cls.__doc__}" for name, cls in BENCHMARKS.items())
    if wants_help:
        print(f"{summary}\n\nbenchmark.py NAME --help shows the options of one.")
        raise SystemExit(0 if arguments else 2)
    name, arguments = commandline.take_name(arguments, BENCHMARKS, "benchmark", default="")
    if not name:
        raise UsageError(f"the benchmark's name comes first: {', '.join(BENCHMARKS)}")
    cls = BENCHMARKS[name]
    return commandline.parse(cls, arguments, prog=f"benchmark.py {name}", description=cls.__doc__, names=BENCHMARKS)


def main(arguments: list[str] | None = None) -> int:
    return commandline.run(lambda: _job(parse(arguments)), again="the same command goes on where it was")


def _job(asked: options.Setting | options.All) -> None:
    # Not before the command line is understood: torch and Ray are slow.
    from raydc.benchmarks import everything, scorecard, setting

    candidate = setting.open_backbone(asked.backbone, asked.arch, asked.seed, setting.networks(RECIPES)).at(asked.size)
    run = everything.run if isinstance(asked, options.All) else everything.RUN[type(asked)]
    print(scorecard.tables(run(asked, candidate)))
    print(asked.folder.place(scorecard.SCORECARD))


if __name__ == "__main__":
    sys.exit(main())
