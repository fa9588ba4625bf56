"""The one inner step loop: precision, memory layout, accumulation, clipping, and where the time goes."""

from __future__ import annotations

import contextlib
import math
import os
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from threadpoolctl import threadpool_limits
from torch import nn

from raydc.config import RunError, TrainConfig
from raydc.optim import learning_rate, scale_larc, set_learning_rate

CHECK_EVERY = 50  # steps between two looks at the loss; each look waits for the device


def has_fast_bf16() -> bool:
    """Whether this CPU multiplies bf16 in hardware (Intel AMX or AVX-512 BF16, AMD Zen 4, ARM BF16)."""
    try:
        with open("/proc/cpuinfo") as file:
            flags = next((line for line in file if line.startswith(("flags", "Features"))), "")
    except OSError:
        return False
    return any(flag in flags.split() for flag in ("amx_bf16", "avx512_bf16", "bf16"))


def choose_precision(asked: str, device: str) -> str:
    """fp32 or bf16, from the machine alone, never from a stopwatch: two runs on one machine choose alike."""
    if asked != "auto":
        return asked
    if device == "cuda" and torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if device == "cuda" or has_fast_bf16() else "fp32"


def choose_threads(asked: int, workers_on_node: int) -> int:
    return asked or max(1, len(os.sched_getaffinity(0)) // max(1, workers_on_node))


@dataclass(frozen=True)
class Compute:
    """How the network is run on this machine."""

    device: torch.device
    precision: str
    channels_last: bool

    def autocast(self) -> contextlib.AbstractContextManager:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def place(self, pixels: torch.Tensor) -> torch.Tensor:
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        return pixels.to(self.device, non_blocking=True, memory_format=layout)

    def prepare(self, model: nn.Module) -> nn.Module:
        return model.to(self.device, memory_format=torch.channels_last if self.channels_last else torch.preserve_format)


def open_compute(
    config: TrainConfig, device: torch.device, workers_on_node: int, *, deterministic: bool
) -> tuple[Compute, int]:
    """How this process computes, and with how many CPU threads; both are set for the whole process."""
    threads = choose_threads(config.threads, workers_on_node)
    torch.set_num_threads(threads)
    # numpy's BLAS too, which Ray starts with one thread: sums of outer products are most of a PCA.
    threadpool_limits(threads)
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = not deterministic
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch asks for it before the first product
        torch.use_deterministic_algorithms(True)
    return Compute(device, config.precision, config.channels_last == "yes"), threads


@dataclass
class Clock:
    """Seconds spent and seconds spent waiting for data in one pass, and the images it saw."""

    began: float = field(default_factory=time.perf_counter)
    waiting: float = 0.0
    images: int = 0
    cpu: float = field(default_factory=time.process_time)

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.began

    def summary(self, images: float) -> dict[str, float]:
        """``images`` are those of all workers; ``cpu_s``, of this process, holds also where the machine is shared."""
        seconds = self.seconds
        return {
            "seconds": round(seconds, 3),
            "waiting_s": round(self.waiting, 3),
            "cpu_s": round(time.process_time() - self.cpu, 2),
            "images_per_s": round(images / max(seconds, 1e-9), 1),
        }


def timed(batches: Iterable, clock: Clock) -> Iterator:
    """The same batches; the time it takes to get each one is waiting."""
    iterator = iter(batches)
    while True:
        began = time.perf_counter()
        batch = next(iterator, None)
        clock.waiting += time.perf_counter() - began
        if batch is None:
            return
        clock.images += len(batch[0])
        yield batch


class Prefetch:
    """The same batches, made ahead in a thread that starts at once; an error in it is raised where its batch would have
    come. The thread ends when nobody iterates any more."""

    def __init__(self, batches: Iterator, depth: int = 2) -> None:
        self.ready: queue.Queue = queue.Queue(depth)
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=_fill, args=(batches, self.ready, self.stopped), daemon=True)
        self.thread.start()

    def __iter__(self) -> Prefetch:
        return self

    def __next__(self):
        if self.stopped.is_set():
            raise StopIteration
        batch, error, ended = self.ready.get()
        if ended:
            self.close()
            raise error or StopIteration
        return batch

    def close(self) -> None:
        self.stopped.set()

    __del__ = close


def _fill(batches: Iterator, ready: queue.Queue, stopped: threading.Event) -> None:
    def put(*item) -> bool:
        while not stopped.is_set():
            with contextlib.suppress(queue.Full):
                ready.put(item, timeout=0.1)
                return True
        return False

    try:
        for batch in batches:
            if not put(batch, None, False):
                return
        put(None, None, True)
    except BaseException as error:  # handed over, whatever it is
        put(None, error, True)


def prefetched(batches: Iterator, streamed: bool, device: torch.device) -> Iterator:
    """The same batches, made ahead in a thread where that does not take the CPU from the network."""
    return Prefetch(batches) if streamed or device.type == "cuda" else batches


@torch.inference_mode()
def run_inference(model: nn.Module, batches: Iterable, compute: Compute, clock: Clock) -> Iterator:
    """(image_ids, float32 outputs on the CPU) for each batch of (image_ids, pixels), in eval mode."""
    model.eval()
    for image_ids, pixels in timed(batches, clock):
        with compute.autocast():
            outputs = model(compute.place(pixels))
        yield image_ids, outputs.float().cpu()


def cross_entropy(scores: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    """The mean over the batch; ``weights`` (k,) have a mean of one over all images, so nothing is divided by them."""
    if weights is None:
        return F.cross_entropy(scores.float(), labels)
    return (weights[labels] * F.cross_entropy(scores.float(), labels, reduction="none")).mean()


def run_steps(
    model: nn.Module,
    batches: Iterable,
    targets: torch.Tensor,
    optimizer: torch.optim.Optimizer,
    config: TrainConfig,
    compute: Compute,
    *,
    criterion: Callable[[Any, torch.Tensor], torch.Tensor] = cross_entropy,
    **how,
) -> float:
    """One pass over batches of (image_ids, pixels) towards ``targets[image_id]``; ``how`` and all else: ``run_batches``.

    ``criterion(outputs, labels)`` is a mean over the batch.
    """

    def loss_of(image_ids: np.ndarray, pixels: torch.Tensor) -> torch.Tensor:
        labels = targets[torch.from_numpy(image_ids)].to(compute.device)
        with compute.autocast():
            outputs = model(compute.place(pixels))
        return criterion(outputs, labels)

    return run_batches(model, batches, loss_of, optimizer, config, compute, **how)


def run_batches(
    model: nn.Module,
    batches: Iterable[tuple[np.ndarray, Any]],
    loss_of: Callable[[np.ndarray, Any], torch.Tensor],
    optimizer: torch.optim.Optimizer,
    config: TrainConfig,
    compute: Compute,
    *,
    epoch: int,
    num_steps: int,
    clock: Clock,
    on_step: Callable[[int], None],
    set_rate: Callable[[torch.optim.Optimizer, float], None] | None = None,
) -> float:
    """A step for each batch; the mean loss. RunError on a loss that is not finite.

    A batch is (image_ids, images), both of which can be cut into slices; ``loss_of(image_ids, images)`` is a mean over them.
    ``set_rate(optimizer, epoch)`` replaces the config's schedule.
    """
    set_rate = set_rate or (lambda optimizer, now: set_learning_rate(optimizer, learning_rate(config, now)))
    model.train()
    total, window = torch.zeros((), device=compute.device), torch.zeros((), device=compute.device)
    step = 0
    for step, batch in enumerate(timed(batches, clock), start=1):
        set_rate(optimizer, epoch + (step - 1) / num_steps)
        window += _one_step(model, batch, loss_of, optimizer, config)
        if step % CHECK_EVERY == 0 or step == num_steps:
            _check_finite(window.item(), epoch, step)
            total, window = total + window, torch.zeros_like(window)
        on_step(step)
    if step != num_steps:
        raise RunError(f"epoch {epoch} gave {step} steps where its plan has {num_steps}; the shards changed under the run")
    return total.item() / num_steps


def _one_step(model, batch: tuple[np.ndarray, Any], loss_of, optimizer, config: TrainConfig) -> torch.Tensor:
    """Forward, backward over micro-batches, update. Gradients of ranks meet in the last micro-batch only."""
    image_ids, images = batch
    size = config.micro_batch or len(image_ids)
    loss_sum: torch.Tensor | float = 0.0
    optimizer.zero_grad(set_to_none=True)
    for start in range(0, len(image_ids), size):
        piece = slice(start, start + size)
        last = start + size >= len(image_ids) or not hasattr(model, "no_sync")
        with contextlib.nullcontext() if last else model.no_sync():
            loss = loss_of(image_ids[piece], images[piece]) * (len(image_ids[piece]) / len(image_ids))
            loss.backward()
        loss_sum = loss_sum + loss.detach()
    if config.clip_norm:
        nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
    if config.larc:
        scale_larc(optimizer, config.larc, config.weight_decay)
    optimizer.step()
    return loss_sum


def _check_finite(loss: float, epoch: int, step: int) -> None:
    if not math.isfinite(loss):
        raise RunError(
            f"the loss is not finite in epoch {epoch}, step {step}; the checkpoint before it is kept: lower train.lr "
            "(or set train.clip_norm) and start a new run directory"
        )
