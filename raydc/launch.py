"""From a plain function to workers on a cluster; knows no algorithm.

Attaches to Ray (or starts it here), checks that what the run needs is there, hands a loop to TorchTrainer, carries the
workers' words to the console, and starts again from the last commit point when a worker dies.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
import torch.distributed as dist
from ray.train.torch import TorchTrainer
from tqdm import tqdm

from raydc.clustering.bank import CoverageError
from raydc.config import RunError, UsageError
from raydc.remote import Remote
from raydc.storage import Folder

RAY_NOTES = "ray"  # folder of the run directory that Ray Train uses while it runs
SPARE_CPUS = 2  # beside the workers': one for the bank, one for data tasks, without which Ray Data would wait forever


# --- the cluster --------------------------------------------------------------------------------------------------------


def attach(num_cpus: int, verbose: bool = False) -> None:
    """Join the cluster of this job (RAY_ADDRESS), or start Ray on this machine with that many (logical) CPUs; a Ray
    already there is used as it is."""
    if ray.is_initialized():
        return
    quiet = {"logging_level": "INFO" if verbose else "ERROR", "log_to_driver": verbose}
    if address := os.environ.get("RAY_ADDRESS"):
        print(f"joining the cluster at {address} ...", flush=True)
        _init(address="auto", **quiet)
        return
    # Never a bare init(): it would try the address that a cluster which is gone left behind, for two minutes.
    home = str(Path(__file__).resolve().parents[1])  # workers find raydc wherever the job was started
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [home, os.environ.get("PYTHONPATH")]))
    print(f"starting Ray on this machine ({num_cpus} CPUs) ...", flush=True)
    _init(address="local", num_cpus=num_cpus, include_dashboard=False, **quiet)


def _init(**options) -> None:
    """ray.init without its answer to SIGTERM, which is a stack trace of C++: the process keeps its own."""
    own, stopped = signal.getsignal(signal.SIGTERM), False
    try:
        ray.init(**options)
    except SystemExit:  # SIGTERM has come already
        stopped = True
    if threading.current_thread() is threading.main_thread():  # elsewhere Ray sets no handler, and nobody can
        signal.signal(signal.SIGTERM, own or signal.SIG_DFL)
    if stopped:
        signal.raise_signal(signal.SIGTERM)


def choose_gpu(asked: str, num_workers: int) -> bool:
    """Whether each worker takes a GPU; UsageError where they are asked for and missing."""
    available = torch.cuda.device_count() if num_workers == 0 else int(ray.cluster_resources().get("GPU", 0))
    if asked == "yes" and available < max(1, num_workers):
        raise UsageError(
            f"--use-gpu yes with {num_workers} workers needs {max(1, num_workers)} GPUs and {available} are there; lower "
            "--num-workers or give --use-gpu no"
        )
    return asked != "no" and available >= max(1, num_workers)


def check_resources(num_workers: int, run_dir: Folder, data: Folder | None = None) -> None:
    """Say at once what is missing, instead of waiting for it."""
    need, have = num_workers + SPARE_CPUS, int(ray.cluster_resources().get("CPU", 0))
    if have < need:
        raise UsageError(
            f"{num_workers} workers need {need} CPUs (one each, one for the bank, one for data), and {have} are there; "
            "lower --num-workers or add nodes"
        )
    num_nodes = len(nodes())
    if num_nodes == 1 or os.environ.get("RAYDC_SHARED_RUN_DIR"):
        return
    for flag, folder in (("--run-dir", run_dir), ("--data", data)):
        if folder is not None and folder.is_local:
            raise UsageError(
                f"the cluster has {num_nodes} nodes and {flag} {folder.uri} is a path of one of them; give an s3:// or "
                "gs:// URI, or set RAYDC_SHARED_RUN_DIR=1 if every node mounts that path"
            )


def nodes() -> list[dict]:
    """The cluster's living nodes, as Ray describes them."""
    return [node for node in ray.nodes() if node["Alive"]]


# --- what workers say ---------------------------------------------------------------------------------------------------


class Console:
    """Lines and one progress bar with its ETA, from the board to the terminal."""

    def __init__(self, board: Remote, poll_s: float = 0.2) -> None:
        self.board, self.poll_s = board, poll_s
        self.bar: tqdm | None = None
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Console:
        self.thread.start()
        return self

    def __exit__(self, *_) -> None:
        self.stop.set()
        self.thread.join(timeout=5)
        if self.bar is not None:
            self.bar.close()

    def _run(self) -> None:
        last = False
        while not last:
            last = self.stop.wait(self.poll_s)
            try:
                for kind, value in self.board.take():
                    self._show(kind, value)
            except Exception:  # the cluster is going down, and with it the last words; or nobody reads on (`| head`)
                return

    def _show(self, kind: str, value: Any) -> None:
        if kind == "line":
            tqdm.write(value)
            sys.stdout.flush()
            return
        done, total, what = value
        if self.bar is None:
            self.bar = tqdm(
                total=total, unit="img", unit_scale=True, dynamic_ncols=True, leave=False, initial=done, disable=None
            )
        self.bar.set_description(what, refresh=False)
        self.bar.update(done - self.bar.n)


# --- a worker -----------------------------------------------------------------------------------------------------------


@dataclass
class Worker:
    """What a loop knows of its place: rank, world_size, device, and how to speak with the others and the driver."""

    board: Remote
    rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    told: float = 0.0

    @classmethod
    def here(cls, board: Remote, use_gpu: bool) -> Worker:
        context = ray.train.get_context()
        device = torch.device("cpu")
        if use_gpu:  # in local mode there is no Ray to ask, and asking would start one
            device = ray.train.torch.get_device() if ray.is_initialized() else torch.device("cuda:0")
        sizes = context.get_world_rank(), context.get_world_size(), context.get_local_world_size()
        return cls(board, *sizes, device=device)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def say(self, text: str) -> None:
        self._post("line", text)

    def _post(self, kind: str, value: Any) -> None:
        """Words are not worth a run: where the board died, they are lost."""
        if self.is_first:
            with contextlib.suppress(CoverageError):
                self.board.send("post", kind, value)

    def progress(self, done: int, total: int, what: str) -> None:
        """Moves the bar on the driver's console, a few times a second at most."""
        now = time.monotonic()
        if now - self.told > 0.3:
            self.told = now
            self._post("progress", (done, total, what))

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier(device_ids=[self.device.index] if self.device.type == "cuda" else None)

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value (small), on every rank."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def all_agree(self, good: bool) -> bool:
        """Whether it is true on every rank."""
        if self.world_size == 1:
            return good
        flag = torch.tensor(int(good), device=self.device)
        dist.all_reduce(flag, dist.ReduceOp.MIN)
        return bool(flag.item())

    def sum(self, value: float) -> float:
        """Over the ranks."""
        if self.world_size == 1:
            return float(value)
        precision = torch.float64 if self.device.type == "cpu" else torch.float32
        total = torch.tensor(value, dtype=precision, device=self.device)
        dist.all_reduce(total)
        return total.item()

    def gather(self, value: Any) -> list | None:
        """The values of all ranks, in their order, on rank 0; None elsewhere."""
        if self.world_size == 1:
            return [value]
        found = [None] * self.world_size if self.is_first else None
        dist.gather_object(value, found, dst=0)
        return found

    def mean(self, value: float) -> float:
        """Over the ranks."""
        return self.sum(value) / self.world_size

    def wrap(self, model: torch.nn.Module) -> torch.nn.Module:
        """The model to be stepped, whose gradients are the mean over the ranks; its weights are the model's own.

        BatchNorm's buffers are made equal at the end of an epoch (models.norm): broadcasting them before every step costs
        time and would throw away what the other ranks saw.
        """
        if self.world_size == 1:
            return model
        on = [self.device] if self.device.type == "cuda" else None
        return torch.nn.parallel.DistributedDataParallel(model, device_ids=on, broadcast_buffers=False)

    def report(self, metrics: dict) -> None:
        """A barrier for all workers that tells Ray (and, through its callback, Tune) of the metrics.

        Checkpoints are the run directory's own: Ray takes none here, and none is left in its book-keeping.
        """
        ray.train.report(metrics)


# --- fit ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """Everything a loop is given; it travels to every worker."""

    config: Any
    run_dir: Folder
    board: Remote
    streams: Any
    bank: Remote | None
    extras: dict
    began: float


def fit(loop: Callable[[Job], Any], job: Job, *, num_workers: int, use_gpu: bool, max_failures: int = 3, callbacks=()):
    """Run ``loop(job)`` on every worker; what rank 0 returns. RunError when it cannot go on.

    A dead worker ends the group, and a new group starts from what the run directory holds, ``max_failures`` times. An
    error the loop raised itself with a remedy (RunError, UsageError) is final.
    """
    if not job.config.verbose:
        logging.getLogger("ray").setLevel(logging.ERROR)
    if num_workers:  # processes that import torch, and streams: seconds, or minutes on a busy machine
        print(f"starting {num_workers} worker{'s' * (num_workers > 1)} ...", flush=True)
    for attempt in range(max_failures + 1):
        try:
            with Console(job.board):
                result = _trainer(loop, job, num_workers, use_gpu, callbacks).fit().return_value
            job.run_dir.delete_folder(RAY_NOTES)
            return result
        except SystemExit:  # how Ray Train's own handler answers Ctrl-C
            raise KeyboardInterrupt from None
        except (ray.train.TrainingFailedError, ray.exceptions.RayTaskError, CoverageError) as error:
            failures = _failures(error)
            for one in failures:
                if isinstance(one, RunError | UsageError):
                    raise one from None
            if not any(map(_is_death, failures)):
                raise RunError(f"{_cause(failures)}; the same command with --verbose shows where") from (
                    error if job.config.verbose else None
                )
            if attempt == max_failures:
                raise RunError(
                    f"workers died {attempt + 1} times, the last time of: {_cause(failures)}; the same command goes on "
                    "from the last commit point (--verbose shows all of Ray's log)"
                ) from None
            print(f"a worker died ({_cause(failures)}); starting again from the last commit point", flush=True)
            job = dataclasses.replace(job, began=time.time())


class _Trainer(TorchTrainer):
    """TorchTrainer without its placement group cleaner, where Ray was started by this process and ends with it.

    The cleaner asks the first dashboard it finds on the machine whether the controller lives. If that is another cluster's,
    the answer is no, and it takes the workers' resources away in the middle of a run (seen with Ray 2.60).
    """

    def _create_default_callbacks(self):
        callbacks = super()._create_default_callbacks()
        if "RAY_ADDRESS" in os.environ:
            return callbacks
        return [one for one in callbacks if type(one).__name__ != "PlacementGroupCleanerCallback"]


def _trainer(loop, job: Job, num_workers: int, use_gpu: bool, callbacks) -> TorchTrainer:
    resources = {"CPU": 1}
    if use_gpu:
        spare = ray.cluster_resources().get("GPU", 0) - num_workers if num_workers else 0
        resources["GPU"] = 1 if spare >= 1 or job.bank is None else 1 - job.config.bank.num_gpus
    # Ray keeps its own notes on a run; ours are enough to go on, so its are thrown away with each start's name.
    run_config = ray.train.RunConfig(
        name=f"start_{int(time.time() * 1000)}",
        storage_path=job.run_dir.path(RAY_NOTES),
        storage_filesystem=job.run_dir.fs,
        callbacks=list(callbacks),
        logging_config=ray.train.LoggingConfig("INFO" if job.config.verbose else "CRITICAL"),
    )
    return _Trainer(
        loop,
        train_loop_config=job,
        scaling_config=ray.train.ScalingConfig(
            num_workers=num_workers, use_gpu=use_gpu, resources_per_worker=resources if num_workers else None
        ),
        run_config=run_config,
        datasets=job.streams.datasets,
        dataset_config=job.streams.data_config,
    )


def _failures(error: Exception) -> list[BaseException]:
    """What the workers raised or died of, and the causes inside."""
    found: list[BaseException] = list(getattr(error, "worker_failures", {}).values()) or [error]
    for one in list(found):
        found += [inner for inner in (getattr(one, "cause", None), one.__cause__) if isinstance(inner, BaseException)]
    return found


def _is_death(failure: BaseException) -> bool:
    """A process or node that is gone, as Ray tells it, a rank that lost its peer, or a bank that lost what a run cannot make
    again from its weights; not an error of the program."""
    text = str(failure)
    return isinstance(failure, ray.exceptions.RayActorError | CoverageError) or any(
        sign in text for sign in ("health check failed", "actor died", "Connection closed by peer", "NCCL", "timed out")
    )


def _cause(failures: list[BaseException]) -> str:
    """The last words of whoever failed first; a rank that only lost its peer is no cause."""
    first = next((one for one in failures if "Connection closed by peer" not in str(one)), failures[0])
    lines = [line.strip() for line in str(first).splitlines() if line.strip()]
    return lines[-1][:200] if lines else type(first).__name__


def versions() -> dict[str, str]:
    """Of what decides the numbers."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": sys.version.split()[0]}
    for package in ("raydc", "torch", "torchvision", "ray", "faiss-gpu", "numpy", "scikit-learn"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
