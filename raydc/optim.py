"""Parameter groups of torch.optim's SGD, and the schedules of its rate."""

from __future__ import annotations

import math

import torch
from torch import nn

from raydc.config import TrainConfig

LR_SCALE = "lr_scale"  # of a parameter group: its rate over the schedule's


def build_optimizer(trunk: nn.Module, head: nn.Module, config: TrainConfig) -> torch.optim.SGD:
    """SGD over everything, decay on biases and BatchNorm too; the head's group has its own momentum (protocol 1b.2)."""
    groups = [
        {"params": [p for p in trunk.parameters() if p.requires_grad]},
        {"params": list(head.parameters()), "momentum": config.head_momentum},
    ]
    decay = 0.0 if config.larc else config.weight_decay  # with LARC it is in the gradient that is scaled
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, weight_decay=decay, nesterov=config.nesterov)


def learning_rate(config: TrainConfig, epoch: float) -> float:
    """The rate at a (fractional) epoch."""
    if epoch < config.warmup_epochs:
        return config.warmup_lr + (config.lr - config.warmup_lr) * epoch / config.warmup_epochs
    if config.schedule == "constant":
        return config.lr
    if config.schedule == "step":
        return config.lr * config.gamma ** sum(epoch >= milestone for milestone in config.milestones)
    length = (config.schedule_epochs or config.epochs) - config.warmup_epochs
    done = min(1.0, (epoch - config.warmup_epochs) / length) if length > 0 else 1.0
    return config.final_lr + (config.lr - config.final_lr) * 0.5 * (1 + math.cos(math.pi * done))


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """The schedule's rate, times each group's own factor where it has one."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get(LR_SCALE, 1.0)


@torch.no_grad()
def scale_larc(optimizer: torch.optim.Optimizer, trust: float, weight_decay: float) -> None:
    """LARC without clipping (You et al., 2017; protocol 1c): the decayed gradient of each tensor is multiplied by ``trust``
    times the tensor's norm over the gradient's. A tensor of zeros, or one whose gradient is zero, steps by its plain
    gradient, without decay.
    """
    for parameter in (p for group in optimizer.param_groups for p in group["params"] if p.grad is not None):
        length, slope = parameter.norm(), parameter.grad.norm()
        ratio = trust * length / (slope + weight_decay * length + 1e-8)
        usual = (length == 0) | (slope == 0)
        decay = torch.where(usual, torch.zeros_like(length), weight_decay)
        parameter.grad.add_(parameter * decay).mul_(torch.where(usual, torch.ones_like(ratio), ratio))


def carry_momentum(optimizer: torch.optim.Optimizer, parameters, source: torch.Tensor) -> None:
    """Row j of each parameter takes the momentum that row ``source[j]`` had; none where that is -1."""
    for parameter in parameters:
        buffer = optimizer.state.get(parameter, {}).get("momentum_buffer")
        if buffer is not None:
            rows = buffer[source.clamp(min=0).to(buffer.device)]
            rows[source < 0] = 0
            buffer.copy_(rows)


def forget_momentum(optimizer: torch.optim.Optimizer, parameters) -> None:
    """Zero the momentum of ``parameters`` (a head with fresh weights starts fresh)."""
    for parameter in parameters:
        state = optimizer.state.get(parameter, {})
        if state.get("momentum_buffer") is not None:
            state["momentum_buffer"].zero_()
