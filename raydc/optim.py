"""Parameter groups of torch.optim's SGD, and the schedules of its rate."""

from __future__ import annotations

import math

import torch
from torch import nn

from raydc.config import TrainConfig

LR_SCALE = "lr_scale"  # of a parameter group: its rate over the schedule's


def build_optimizer(backbone: nn.Module, head: nn.Module, config: TrainConfig) -> torch.optim.SGD:
    """SGD over everything, decay on biases and BatchNorm too; the head's group has its own momentum (protocol 1b.2)."""
    groups = [
        {"params": [p for p in backbone.parameters() if p.requires_grad]},
        {"params": list(head.parameters()), "momentum": config.head_momentum},
    ]
    return torch.optim.SGD(
        groups, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay, nesterov=config.nesterov
    )


def learning_rate(config: TrainConfig, epoch: float) -> float:
    """The rate at a (fractional) epoch."""
    if config.schedule == "constant":
        return config.lr
    if config.schedule == "step":
        return config.lr * config.gamma ** sum(epoch >= milestone for milestone in config.milestones)
    length = config.schedule_epochs or config.epochs
    return config.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, epoch / length)))


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """The schedule's rate, times each group's own factor where it has one."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get(LR_SCALE, 1.0)


def forget_momentum(optimizer: torch.optim.Optimizer, parameters) -> None:
    """Zero the momentum of ``parameters`` (a head with fresh weights starts fresh)."""
    for parameter in parameters:
        state = optimizer.state.get(parameter, {})
        if state.get("momentum_buffer") is not None:
            state["momentum_buffer"].zero_()
