"""Rates, LARC and momentum against values worked by hand (protocol 1c and You et al., 2017)."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from raydc.config import TrainConfig
from raydc.optim import build_optimizer, carry_momentum, forget_momentum, learning_rate, scale_larc, set_learning_rate

pytestmark = pytest.mark.usefixtures("one_thread")

# Protocol 1c: from .3 to 4.8 in ten epochs, then a cosine to .0048.
V2 = TrainConfig(epochs=400, lr=4.8, final_lr=0.0048, warmup_epochs=10, warmup_lr=0.3, schedule="cosine")


# --- rates --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("epoch", "rate"),
    [
        (0, 0.3),
        (2.5, 1.425),  # a quarter of the way from .3 to 4.8
        (5, 2.55),
        (10, 4.8),
        (107.5, 4.0977592),  # a quarter of 390 epochs: .0048 + 2.3976 * (1 + .70710678)
        (205, 2.4024),  # (4.8 + .0048) / 2
        (400, 0.0048),
        (500, 0.0048),
    ],
)
def test_warmup_then_cosine_by_hand(epoch, rate):
    assert learning_rate(V2, epoch) == pytest.approx(rate, rel=1e-6)


def test_the_rate_has_no_jump_where_the_warmup_ends():
    assert learning_rate(V2, 10 - 1e-9) == pytest.approx(learning_rate(V2, 10), rel=1e-6)
    rates = [learning_rate(V2, epoch) for epoch in np.linspace(10, 400, 200)]
    assert (np.diff(rates) < 0).all()


@pytest.mark.parametrize(
    ("changes", "epoch", "rate"),
    [
        ({"schedule": "constant"}, 5, 2.55),
        ({"schedule": "constant"}, 399, 4.8),
        ({"schedule": "step", "milestones": (20, 30)}, 5, 2.55),
        ({"schedule": "step", "milestones": (20, 30)}, 19.99, 4.8),
        ({"schedule": "step", "milestones": (20, 30)}, 20, 0.48),
        ({"schedule": "step", "milestones": (20, 30), "gamma": 0.5}, 30, 1.2),
        ({"schedule_epochs": 790}, 400, 2.4024),  # half of the 780 epochs after the warm-up
        ({"warmup_epochs": 0}, 0, 4.8),
        ({"warmup_epochs": 0, "final_lr": 0.0}, 200, 2.4),
        ({"epochs": 10}, 5, 2.55),  # nothing but warm-up
        ({"epochs": 10}, 10, 0.0048),
    ],
)
def test_warmup_before_every_schedule(changes, epoch, rate):
    assert learning_rate(replace(V2, **changes), epoch) == pytest.approx(rate, rel=1e-6)


def test_odc_falls_to_two_fifths_at_epoch_400():
    """Protocol 1d: .06, step [400], gamma .4."""
    config = TrainConfig(epochs=440, lr=0.06, schedule="step", milestones=(400,), gamma=0.4)
    assert learning_rate(config, 399.99) == 0.06
    assert learning_rate(config, 400) == pytest.approx(0.024)


def test_every_group_gets_the_rate_times_its_own_factor():
    layer = nn.Linear(2, 2)
    optimizer = torch.optim.SGD([{"params": [layer.weight]}, {"params": [layer.bias], "lr_scale": 10.0}], lr=1.0)
    set_learning_rate(optimizer, 0.03)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.03, 0.3])


# --- groups -------------------------------------------------------------------------------------------------------------


def test_the_head_has_its_own_momentum_and_all_else_alike():
    trunk, head = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), nn.Linear(4, 2)
    trunk[0].bias.requires_grad_(False)
    config = TrainConfig(lr=0.1, momentum=0.9, head_momentum=0.25, weight_decay=1e-3, nesterov=True)
    first, last = build_optimizer(trunk, head, config).param_groups
    assert (first["momentum"], last["momentum"]) == (0.9, 0.25)
    for group in (first, last):
        assert (group["lr"], group["weight_decay"], group["nesterov"]) == (0.1, 1e-3, True)
    assert set(first["params"]) == {trunk[0].weight, *trunk[1].parameters()}, (
        "BatchNorm decays too, what is frozen is not there"
    )
    assert set(last["params"]) == set(head.parameters())


def test_with_larc_the_decay_is_not_applied_twice():
    groups = build_optimizer(nn.Linear(2, 2), nn.Linear(2, 2), TrainConfig(larc=0.001, weight_decay=1e-6)).param_groups
    assert [group["weight_decay"] for group in groups] == [0.0, 0.0]


# --- LARC ---------------------------------------------------------------------------------------------------------------


def parameter(values, gradient) -> nn.Parameter:
    made = nn.Parameter(torch.tensor(values, dtype=torch.float32))
    made.grad = None if gradient is None else torch.tensor(gradient, dtype=torch.float32)
    return made


def test_larc_by_hand():
    """|w| 5, |g| 1, decay .1, trust .001: .001 * 5 / (1 + .5) = 1/300 of the decayed gradient (.9, 1.2)."""
    w = parameter([3, 4], [0.6, 0.8])
    optimizer = torch.optim.SGD([w], lr=2.0)
    scale_larc(optimizer, 0.001, 0.1)
    assert torch.allclose(w.grad, torch.tensor([0.003, 0.004]), rtol=1e-6)
    optimizer.step()
    assert torch.allclose(w.detach(), torch.tensor([2.994, 3.992]), rtol=1e-6)


def test_larc_without_decay_makes_every_step_the_same_share_of_the_weights():
    for size in (1e-4, 1.0, 1e4):
        w = parameter([3, 4], [0.6 * size, -0.8 * size])
        scale_larc(torch.optim.SGD([w], lr=1.0), 0.001, 0.0)
        assert torch.allclose(w.grad, torch.tensor([0.003, -0.004]), rtol=1e-3), size


@pytest.mark.parametrize(
    ("values", "gradient", "kept"),
    [
        ([0.0, 0.0], [0.6, 0.8], [0.6, 0.8]),  # a bias that begins at zero could never move
        ([3.0, 4.0], [0.0, 0.0], [0.0, 0.0]),
        ([0.0, 0.0], [0.0, 0.0], [0.0, 0.0]),
    ],
)
def test_larc_leaves_the_gradient_where_a_norm_is_zero(values, gradient, kept):
    w = parameter(values, gradient)
    scale_larc(torch.optim.SGD([w], lr=1.0), 0.001, 0.1)
    assert w.grad.tolist() == pytest.approx(kept)


def test_larc_passes_over_what_has_no_gradient():
    frozen, free = parameter([3, 4], None), parameter([3, 4], [0.6, 0.8])
    scale_larc(torch.optim.SGD([{"params": [frozen]}, {"params": [free]}], lr=1.0), 0.001, 0.1)
    assert frozen.grad is None
    assert torch.allclose(free.grad, torch.tensor([0.003, 0.004]), rtol=1e-6), "the second group too"


def test_three_steps_of_larc_with_momentum_are_the_papers_in_numpy():
    """v <- m v + lr * trust |w| / (|g| + decay |w|) * (g + decay w); w <- w - v, for each tensor on its own."""
    rng = np.random.default_rng(0)
    shapes, trust, decay, rate, momentum = [(4, 3), (5,)], 0.02, 0.01, 0.5, 0.9
    layers = nn.ParameterList(nn.Parameter(torch.from_numpy(rng.normal(size=shape).astype("f4"))) for shape in shapes)
    config = TrainConfig(lr=rate, momentum=momentum, weight_decay=decay, larc=trust)
    optimizer = build_optimizer(layers, nn.ParameterList(), replace(config, head_momentum=momentum))
    w, v = [p.detach().numpy().astype(float) for p in layers], [0.0, 0.0]
    for _ in range(3):
        g = [rng.normal(size=shape) for shape in shapes]
        for p, gradient in zip(layers, g, strict=True):
            p.grad = torch.from_numpy(gradient.astype("f4"))
        scale_larc(optimizer, trust, decay)
        optimizer.step()
        for n in range(2):
            length, slope = np.linalg.norm(w[n]), np.linalg.norm(g[n])
            v[n] = momentum * v[n] + trust * length / (slope + decay * length) * (g[n] + decay * w[n])
            w[n] = w[n] - rate * v[n]
    for p, expected in zip(layers, w, strict=True):
        np.testing.assert_allclose(p.detach().numpy(), expected, rtol=1e-5, atol=1e-6)


# --- momentum -----------------------------------------------------------------------------------------------------------


def head_with_momentum(momentum: float = 0.9) -> tuple[nn.Linear, torch.optim.SGD]:
    """After one step on gradients that are known: row j of the weights' is (j + 1, j + 1), of the bias's 10 (j + 1)."""
    head = nn.Linear(2, 3)
    head.weight.grad = torch.tensor([[1.0, 1], [2, 2], [3, 3]])
    head.bias.grad = torch.tensor([10.0, 20, 30])
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1, momentum=momentum)
    optimizer.step()
    return head, optimizer


def test_momentum_follows_its_rows():
    head, optimizer = head_with_momentum()
    carry_momentum(optimizer, head.parameters(), torch.tensor([2, -1, 1]))
    assert optimizer.state[head.weight]["momentum_buffer"].tolist() == [[3, 3], [0, 0], [2, 2]]
    assert optimizer.state[head.bias]["momentum_buffer"].tolist() == [30, 0, 20]


def test_the_next_step_goes_where_the_carried_momentum_points():
    """A gradient of zero: each row moves by -lr * .9 * its momentum."""
    head, optimizer = head_with_momentum()
    carry_momentum(optimizer, head.parameters(), torch.tensor([2, -1, 1]))
    before = head.weight.detach().clone()
    optimizer.zero_grad(set_to_none=False)
    optimizer.step()
    moved = head.weight.detach() - before
    assert torch.allclose(moved, torch.tensor([[-0.27, -0.27], [0, 0], [-0.18, -0.18]]), atol=1e-6)


def test_momentum_of_other_parameters_stays():
    head, optimizer = head_with_momentum()
    carry_momentum(optimizer, [head.bias], torch.tensor([-1, -1, -1]))
    assert optimizer.state[head.weight]["momentum_buffer"].tolist() == [[1, 1], [2, 2], [3, 3]]
    assert optimizer.state[head.bias]["momentum_buffer"].tolist() == [0, 0, 0]


def test_without_momentum_there_is_nothing_to_carry_or_forget():
    head, optimizer = head_with_momentum(0.0)
    other = nn.Linear(2, 3)  # nor before the first step
    for layer, sgd in ((head, optimizer), (other, torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9))):
        before = layer.weight.detach().clone()
        carry_momentum(sgd, layer.parameters(), torch.tensor([2, -1, 1]))
        forget_momentum(sgd, layer.parameters())
        sgd.zero_grad(set_to_none=False)
        sgd.step()
        assert torch.equal(layer.weight, before)


def test_forgotten_momentum_is_zero():
    head, optimizer = head_with_momentum()
    forget_momentum(optimizer, [head.weight])
    assert not optimizer.state[head.weight]["momentum_buffer"].any()
    assert optimizer.state[head.bias]["momentum_buffer"].tolist() == [10, 20, 30]
