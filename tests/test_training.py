"""The step loop, bare: gradients, rates, momentum, and the thread that makes batches ahead."""

import math
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from raydc.config import ModelConfig, RunError, TrainConfig
from raydc.models.backbone import build_backbone
from raydc.models.head import Classifier
from raydc.optim import build_optimizer, forget_momentum, learning_rate
from raydc.training import Clock, Compute, Prefetch, choose_precision, choose_threads, run_inference, run_steps, timed

CPU = Compute(torch.device("cpu"), "fp32", channels_last=False)
CONFIG = TrainConfig(epochs=10, batch_size=60, lr=0.1)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """600 real digits as pixels (600, 3, 8, 8) in 0..255, with their classes."""
    data = load_digits()
    pixels = torch.from_numpy(data.images[:600] * 255 / 16).float()
    return pixels[:, None].expand(-1, 3, -1, -1).contiguous(), torch.from_numpy(data.target[:600]).long()


def build(seed: int = 0) -> Classifier:
    model = Classifier(build_backbone(ModelConfig(architecture="resnet10", width=8, stem="small", stem_stride=1), seed), 10)
    model.head.refresh(1)
    return model


class Plain(nn.Module):
    """A small network without BatchNorm: backbone and head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.ReLU())
        self.head = nn.Linear(16, 10)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.head(self.backbone(pixels / 255))


def batches(pixels: torch.Tensor, size: int = 60):
    return ((ids, pixels[ids]) for ids in np.arange(len(pixels)).reshape(-1, size))


def steps(model, digits, config=CONFIG, *, num_steps: int = 10, epoch: int = 0, pixels=None, optimizer=None, on_step=None):
    optimizer = optimizer or build_optimizer(model.backbone, model.head, config)
    images = digits[0] if pixels is None else pixels
    return run_steps(
        model,
        batches(images),
        digits[1],
        optimizer,
        config,
        CPU,
        epoch=epoch,
        num_steps=num_steps,
        clock=Clock(time.perf_counter()),
        on_step=on_step or (lambda step: None),
    )


def test_the_loop_learns_digits_and_returns_the_mean_loss(digits):
    model = build()
    first = steps(model, digits)
    assert first < math.log(10) + 0.3, "from the head's start at ln 10"
    for epoch in range(1, 5):
        last = steps(model, digits, epoch=epoch)
    assert last < 0.3 * first


def test_the_loop_is_plain_sgd(digits):
    """The same ten steps written out with torch alone."""
    ours, theirs = Plain(), Plain()
    found = steps(ours, digits)
    groups = [{"params": theirs.backbone.parameters()}, {"params": theirs.head.parameters(), "momentum": 0}]
    sgd, losses = torch.optim.SGD(groups, lr=0.1, momentum=0.9, weight_decay=1e-5), []
    for ids, images in batches(digits[0]):
        loss = nn.functional.cross_entropy(theirs(images), digits[1][ids])
        sgd.zero_grad()
        loss.backward()
        sgd.step()
        losses.append(loss.item())
    assert found == pytest.approx(np.mean(losses), rel=1e-5)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("micro_batch", [1, 16, 30, 59, 60, 100])
def test_micro_batches_give_the_whole_batchs_gradient(digits, micro_batch):
    """Also where the last piece is smaller than the others."""
    grads = []
    for size in (0, micro_batch):
        model = Plain()
        loss = steps(model, digits, replace(CONFIG, micro_batch=size), num_steps=1, pixels=digits[0][:60])
        grads.append([loss, *(p.grad.clone() for p in model.parameters())])
    assert grads[0][0] == pytest.approx(grads[1][0], rel=1e-5)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(grads[0][1:], grads[1][1:], strict=True))


def test_clipping_is_torchs(digits):
    norms = []
    for clip in (0.0, 0.01):
        model = Plain()
        steps(model, digits, replace(CONFIG, clip_norm=clip), num_steps=1, pixels=digits[0][:60])
        norms.append(torch.stack([p.grad.norm() for p in model.parameters()]).norm().item())
    assert norms[0] > 0.02
    assert norms[1] == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("where", [0, 9])
def test_a_loss_that_is_not_finite_names_the_epoch_and_the_remedy(digits, where):
    spoilt = digits[0].clone()
    spoilt[60 * where] = math.nan
    with pytest.raises(RunError, match="not finite in epoch 7.*lower train.lr"):
        steps(Plain(), digits, epoch=7, pixels=spoilt)


@pytest.mark.parametrize("num_steps", [9, 11])
def test_another_number_of_steps_than_planned_is_an_error(digits, num_steps):
    with pytest.raises(RunError, match=f"epoch 0 gave 10 steps where its plan has {num_steps}"):
        steps(Plain(), digits, num_steps=num_steps)


def test_every_step_is_told_and_the_rate_follows_it(digits):
    model, seen = Plain(), []
    config = replace(CONFIG, schedule="cosine", epochs=2)
    optimizer = build_optimizer(model.backbone, model.head, config)
    steps(
        model,
        digits,
        config,
        optimizer=optimizer,
        on_step=lambda step: seen.append((step, *(group["lr"] for group in optimizer.param_groups))),
    )
    assert [step for step, *_ in seen] == list(range(1, 11))
    for step, backbone_rate, head_rate in seen:
        assert backbone_rate == head_rate == pytest.approx(0.05 * (1 + math.cos(math.pi * (step - 1) / 10 / 2)))


# --- rates and groups ---------------------------------------------------------------------------------------------------


def test_a_constant_rate_is_constant():
    assert {learning_rate(CONFIG, epoch) for epoch in (0, 3.5, 10, 99)} == {0.1}


def test_cosine_is_torchs_closed_form():
    config = replace(CONFIG, schedule="cosine", epochs=8)
    sgd = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(sgd, T_max=8)
    for epoch in range(9):
        assert learning_rate(config, epoch) == pytest.approx(schedule.get_last_lr()[0], abs=1e-9)
        sgd.step()
        schedule.step()


def test_cosine_by_hand():
    config = replace(CONFIG, schedule="cosine", epochs=8)
    assert [learning_rate(config, epoch) for epoch in (0, 4, 8, 12)] == pytest.approx([0.1, 0.05, 0, 0], abs=1e-12)
    longer = replace(config, schedule_epochs=16)
    assert learning_rate(longer, 8) == pytest.approx(0.05)
    assert learning_rate(longer, 16 / 3) == pytest.approx(0.075)


def test_decay_is_on_everything_and_momentum_not_on_the_head():
    """Protocol 1b.2 and 12: weight decay covers biases and BatchNorm; the head's group differs in momentum alone."""
    model = build()
    optimizer = build_optimizer(model.backbone, model.head, TrainConfig(lr=0.3, weight_decay=1e-4))
    backbone, head = optimizer.param_groups
    assert {id(p) for p in backbone["params"]} == {id(p) for p in model.backbone.parameters()}
    assert {id(p) for p in head["params"]} == {id(model.head.weight), id(model.head.bias)}
    assert (backbone["momentum"], head["momentum"]) == (0.9, 0.0)
    for group in (backbone, head):
        assert (group["lr"], group["weight_decay"], group["nesterov"], group["dampening"]) == (0.3, 1e-4, False, 0)


def test_forgetting_momentum_touches_the_head_only(digits):
    model, config = build(), replace(CONFIG, head_momentum=0.9)
    optimizer = build_optimizer(model.backbone, model.head, config)
    steps(model, digits, config, optimizer=optimizer)
    buffers = {p: optimizer.state[p]["momentum_buffer"] for p in model.parameters()}
    before = {p: buffer.clone() for p, buffer in buffers.items()}
    forget_momentum(optimizer, model.head.parameters())
    for p in model.head.parameters():
        assert before[p].abs().max() > 0 and (buffers[p] == 0).all()
        assert optimizer.state[p]["momentum_buffer"] is buffers[p]
    assert all(torch.equal(buffers[p], before[p]) and before[p].abs().max() > 0 for p in model.backbone.parameters())


def test_forgetting_momentum_before_the_first_step_is_fine():
    model = build()
    forget_momentum(build_optimizer(model.backbone, model.head, CONFIG), model.head.parameters())


# --- inference, and batches made ahead ----------------------------------------------------------------------------------


def test_inference_is_in_eval_mode_and_changes_nothing(digits):
    model = build().train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    clock = Clock(time.perf_counter())
    found = list(run_inference(model, batches(digits[0]), CPU, clock))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert np.array_equal(np.concatenate([ids for ids, _ in found]), np.arange(600))
    with torch.no_grad():
        expected = model.eval()(digits[0])
    assert torch.allclose(torch.cat([scores for _, scores in found]), expected, atol=1e-4)
    assert clock.images == 600


def test_bf16_is_near_fp32_and_comes_back_as_float32(digits):
    model = build()
    low = Compute(torch.device("cpu"), "bf16", channels_last=True)
    outputs = [next(run_inference(model, batches(digits[0]), one, Clock(0.0)))[1] for one in (CPU, low)]
    assert outputs[1].dtype == torch.float32
    assert (outputs[0] - outputs[1]).abs().max() < 0.05 * outputs[0].abs().max()
    assert not torch.equal(*outputs)


def test_timed_passes_every_batch_and_counts_images():
    clock = Clock(time.perf_counter())
    assert list(timed([([1, 2], "a"), ([3], "b")], clock)) == [([1, 2], "a"), ([3], "b")]
    assert clock.images == 3
    assert clock.summary(4).keys() >= {"seconds", "waiting_s", "images_per_s"}


def test_choices_follow_what_was_asked():
    assert [choose_precision(asked, "cpu") for asked in ("fp32", "bf16")] == ["fp32", "bf16"]
    assert choose_precision("auto", "cuda") == "bf16"
    assert choose_threads(3, 2) == 3
    assert choose_threads(0, 10_000) == 1


def running() -> set[threading.Thread]:
    return set(threading.enumerate())


def wait_until(happened) -> bool:
    """Generous: a busy machine is no failure."""
    for _ in range(300):
        if happened():
            return True
        time.sleep(0.1)
    return False


@pytest.mark.parametrize("depth", [1, 2, 50])
def test_prefetch_gives_the_same_batches_in_order(depth):
    before = running()
    assert list(Prefetch(iter(range(1, 40)), depth)) == list(range(1, 40))
    assert list(Prefetch(iter([]), depth)) == []
    assert wait_until(lambda: running() <= before)


def test_prefetch_works_ahead_but_no_further_than_its_depth():
    made = []

    def producer():
        for number in range(1, 100):
            made.append(number)
            yield number

    ahead = Prefetch(producer(), depth=2)
    assert next(ahead) == 1
    assert wait_until(lambda: len(made) >= 3)
    time.sleep(0.3)
    assert len(made) <= 4, "one taken, two waiting, one in hand"
    ahead.close()


def test_prefetch_raises_the_producers_error_where_its_batch_would_have_come():
    before = running()

    def producer():
        yield 1
        yield 2
        raise OSError("the shard is gone")

    ahead = Prefetch(producer())
    assert [next(ahead), next(ahead)] == [1, 2]
    with pytest.raises(OSError, match="the shard is gone"):
        next(ahead)
    assert wait_until(lambda: running() <= before)


def test_the_thread_ends_when_the_consumer_stops():
    before = running()

    def endless():
        number = 0
        while True:
            number += 1
            yield number

    ahead = Prefetch(endless())
    assert next(ahead) == 1
    assert len(running() - before) == 1
    ahead.close()
    assert wait_until(lambda: running() <= before)


def test_the_thread_ends_when_the_loop_fails(digits):
    before = running()
    spoilt = digits[0].clone()
    spoilt[:] = math.nan
    config = replace(CONFIG, batch_size=6)
    model = Plain()
    with pytest.raises(RunError, match="not finite"):
        run_steps(
            model,
            Prefetch(batches(spoilt, 6)),
            digits[1],
            build_optimizer(model.backbone, model.head, config),
            config,
            CPU,
            epoch=0,
            num_steps=100,
            clock=Clock(0.0),
            on_step=lambda step: None,
        )
    assert wait_until(lambda: running() <= before)
