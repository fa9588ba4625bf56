"""Sweep the page's nine settings of semi-supervised fine-tuning with Ray Tune."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this very copy, also in a job's unpacked working directory

from raydc import commandline
from raydc.benchmarks.options import Sweep, trial_name
from raydc.config import RunError
from raydc.recipes import RECIPES

STOPPED = "stopped.json"
HELP = """Fine-tune a backbone with a part of the labels, at each point of the page's grid, and name the best.
  tuning/semisup.py --backbone runs/in1k_resnet50 --data SHARDS --fraction 0.01 --run-dir runs/sweep
"""


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    return commandline.run(
        lambda: _job(commandline.parse(Sweep, arguments, prog="semisup.py", description=HELP)),
        again="the same command goes on where it was; finished trials are not repeated",
    )


def _job(sweep: Sweep) -> None:
    os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")  # Ctrl-C is ours
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    from raydc.benchmarks import learner, scorecard, semisup, setting

    sweep = replace(sweep, run_dir=sweep.folder.uri)  # a trial's process has another working directory
    candidate = setting.open_backbone(sweep.backbone, sweep.arch, sweep.seed, setting.networks(RECIPES)).at(sweep.size)
    data = learner.open_shards(sweep.data)
    ids = semisup.choose_ids(sweep, data)
    free = ("max_concurrent", "cpus_per_trial", "threads")
    setting.claim(sweep, semisup.facts(candidate, data, ids), others=free)
    print(f"{semisup.benchmark_name(sweep, data, ids)} of {candidate.name} on {data.describe(len(ids))}", flush=True)
    failures = run(sweep, candidate, data, ids)
    results = finished(sweep)
    print(table(sweep, results, failures))
    if not results:
        raise RunError(f"not one trial of {sweep.folder.uri} came through; --verbose shows Ray's log")
    point = best(results)
    rows = semisup.to_rows(sweep.trial(*point), candidate, data, ids, results[point])
    rows = [scorecard.noted(row, f"best of {len(results)} settings on val, as published") for row in rows]
    scorecard.write(sweep.folder, rows)
    print(scorecard.tables(rows))
    print(sweep.folder.place(scorecard.SCORECARD))


def finished(sweep: Sweep) -> dict[tuple[float, float], dict]:
    """result.json of each point of the grid that has one."""
    found = {point: sweep.trial(*point).folder for point in sweep.grid}
    return {point: folder.read_json("result.json") for point, folder in found.items() if folder.exists("result.json")}


def best(results: dict[tuple[float, float], dict]) -> tuple[float, float]:
    """The point with the highest top-1; of equals the first of the grid."""
    return max(results, key=lambda point: results[point]["figures"]["top1"])


def table(sweep: Sweep, results: dict, failures: dict[str, str]) -> str:
    """A line for each point of the grid."""
    lines = ["", f"{'trial':<18}{'Top-1':>8}{'Top-5':>8}"]
    for point in sweep.grid:
        name, result = trial_name(*point), results.get(point)
        mark = "  best" if results and point == best(results) else ""
        if result:
            lines.append(f"{name:<18}{result['figures']['top1']:>8.2f}{result['figures']['top5']:>8.2f}{mark}")
        else:
            lines.append(f"{name:<18}{'-':>8}{'-':>8}  {failures.get(name, 'not finished')}")
    return "\n".join(lines) + "\n"


# --- Ray Tune -----------------------------------------------------------------------------------------------------------


def run(sweep: Sweep, candidate, data, ids) -> dict[str, str]:
    """Train what has no result yet; {trial: why it has none} of those that failed or were stopped early."""
    done, stopped = finished(sweep), stopped_early(sweep)
    todo = [point for point in sweep.grid if point not in done and trial_name(*point) not in stopped]
    if not todo:
        return stopped
    from raydc import launch
    from raydc.remote import Shared

    launch.attach(max(os.cpu_count() or 1, sweep.cpus_per_trial, sweep.num_workers + launch.SPARE_CPUS), sweep.verbose)
    launch.check_resources(sweep.num_workers, sweep.folder)

    import ray
    from ray import tune

    need = max(1, sweep.num_workers)
    use_gpu = launch.choose_gpu(sweep.use_gpu, need)
    cpus = int(ray.cluster_resources().get("CPU", 1))
    at_once = (cpus - launch.SPARE_CPUS) // need if sweep.num_workers else cpus // sweep.cpus_per_trial
    if use_gpu:
        at_once = min(at_once, int(ray.cluster_resources()["GPU"]) // need)
    at_once = max(1, min(sweep.max_concurrent or len(todo), at_once, len(todo)))
    # A trial that hands its work to Ray Train holds no CPU itself: else drivers alone could fill the machine for ever.
    resources = {"CPU": 0.01} if sweep.num_workers else {"CPU": sweep.cpus_per_trial, "GPU": int(use_gpu)}
    print(f"{len(todo)} trials, {at_once} at once, on {'GPU' if use_gpu else 'CPU'}", flush=True)
    streams = shared_images(sweep, candidate, data, ids)
    parts = tuple(Shared(part, local=False) for part in (candidate, data, ids))
    tuner = tune.Tuner(
        tune.with_resources(partial(train_point, sweep=sweep, parts=parts, streams=streams, use_gpu=use_gpu), resources),
        param_space={"point": tune.grid_search(todo)},
        tune_config=tune.TuneConfig(
            metric="top1",
            mode="max",
            max_concurrent_trials=at_once,
            scheduler=scheduler(sweep) if sweep.asha else None,
            trial_name_creator=lambda trial: name_of(trial.config),
            trial_dirname_creator=lambda trial: name_of(trial.config),
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=sweep.folder.path("ray"),
            storage_filesystem=sweep.folder.fs,
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=1),
            callbacks=[progress_callback()],
        ),
    )
    results = tuner.fit()
    sweep.folder.delete_folder("ray")
    done = finished(sweep)
    left = {name_of(result.config): result for result in results if tuple(result.config["point"]) not in done}
    if sweep.asha:
        stopped |= {name: why(result) for name, result in left.items() if result.error is None}
        sweep.folder.write_json(STOPPED, stopped)
    return {name: why(result) for name, result in left.items()} | stopped


def stopped_early(sweep: Sweep) -> dict[str, str]:
    """Trials that ASHA gave up, which are not begun again while it is asked for."""
    return sweep.folder.read_json(STOPPED) if sweep.asha and sweep.folder.exists(STOPPED) else {}


def name_of(config: dict) -> str:
    return trial_name(*config["point"])


def why(result) -> str:
    """In a few words, for a trial without a result."""
    if result.error is not None:
        return f"failed: {[line for line in str(result.error).splitlines() if line.strip()][-1].strip()[:100]}"
    metrics = result.metrics or {}
    return f"stopped after epoch {metrics.get('epoch', 0)} at Top-1 {metrics.get('top1', float('nan')):.2f}"


def scheduler(sweep: Sweep):
    from ray.tune.schedulers import ASHAScheduler

    from raydc.benchmarks import semisup

    epochs = sweep.epochs or semisup.SCHEDULE.epochs
    return ASHAScheduler(time_attr="epoch", max_t=epochs, grace_period=max(1, epochs // 4))


def shared_images(sweep: Sweep, candidate, data, ids):
    """The decoded images, once for all trials of a node; None where they are streamed by each trial's workers."""
    from raydc.benchmarks import semisup
    from raydc.config import UsageError

    one = replace(sweep.trial(*sweep.grid[0]), num_workers=max(1, sweep.num_workers))
    job = semisup.prepare(one, candidate, data, ids)
    if job.streams.cached is None and sweep.num_workers == 0:
        raise UsageError("these images do not fit into memory and are streamed; give --num-workers 1 or more for each trial")
    return job.streams if job.streams.cached is not None else None


def train_point(config: dict, sweep: Sweep, parts: tuple, streams, use_gpu: bool) -> None:
    """One point of the grid, as Tune calls it."""
    from ray import tune
    from ray.tune.integration.ray_train import TuneReportCallback

    from raydc.benchmarks import semisup, setting

    candidate, data, ids = (part.get() for part in parts)
    options = sweep.trial(*config["point"])
    setting.claim(options, semisup.facts(candidate, data, ids), others=("threads",))
    job = semisup.prepare(options, candidate, data, ids, streams)
    epochs = job.config.train.epochs  # its figures are told when result.json is written
    if options.num_workers:
        figures = semisup.train(options, job, [TuneReportCallback()])
    else:
        figures = semisup.fine_tune(
            job, lone_worker(use_gpu), tell=lambda seen: seen["epoch"] < epochs and tune.report(seen)
        )
    semisup.finish(options, figures)
    tune.report({"epoch": epochs, "top1": figures["top1"], "top5": figures["top5"]})


def lone_worker(use_gpu: bool):
    """A worker that is its own group, in a process of Tune's."""
    import torch

    from raydc import launch
    from raydc.remote import Board, Remote

    class Alone(launch.Worker):
        def report(self, metrics: dict) -> None:
            """Tune is told of the looks at val, not of every commit."""

    return Alone(Remote(Board, local=True), device=torch.device("cuda" if use_gpu else "cpu"))


def progress_callback():
    from ray import tune

    class Progress(tune.Callback):
        ended = 0

        def on_trial_result(self, iteration, trials, trial, result, **info):
            figures = f"epoch {result['epoch']:>3}  Top-1 {result['top1']:.2f}  Top-5 {result['top5']:.2f}"
            print(f"{name_of(trial.config):<18}{figures}", flush=True)

        def on_trial_complete(self, iteration, trials, trial, **info):
            self.ended += 1
            print(f"{name_of(trial.config):<18}ended, the {self.ended}. to do so", flush=True)

        def on_trial_error(self, iteration, trials, trial, **info):
            print(f"{name_of(trial.config):<18}failed; the others go on", flush=True)

    return Progress()


if __name__ == "__main__":
    sys.exit(main())
