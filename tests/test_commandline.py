"""Words that are not understood get one sentence with the remedy; ways to end get their exit codes."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass, field
from typing import Annotated, Literal

import pytest
import tyro

from raydc import commandline
from raydc.config import RunError, UsageError

NAMES = ("digits", "cifar10_resnet18", "in1k_resnet50")


@dataclass(frozen=True, kw_only=True)
class Section:
    epochs: int = 5
    schedule_epochs: int = 0
    batch_size: int = 8
    scale: tuple[float, float] = (0.5, 1.0)
    milestones: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Fields:
    src: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SRC")]
    seed: int = 0
    lr: float | None = None
    stem: Literal["small", "imagenet"] = "small"
    verbose: bool = False
    data: str = ""
    train: Section = field(default_factory=Section)


def parse(text: str) -> Fields:
    return commandline.parse(Fields, text.split(), prog="job.py", description="A job.", names=NAMES)


def test_what_is_understood():
    found = parse("photos --seed 3 --train.batch_size=2 --train.scale 0.1 0.2 --verbose --lr -1 --train.milestones 3 4")
    train = Section(batch_size=2, scale=(0.1, 0.2), milestones=(3.0, 4.0))
    assert found == Fields(src="photos", seed=3, lr=-1.0, verbose=True, train=train)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("a --train.epoch 5", "there is no --train.epoch; did you mean --train.epochs?"),
        ("a --epochs 5", "there is no --epochs; did you mean --train.epochs?"),
        ("a --train.batchsize=5", "there is no --train.batchsize; did you mean --train.batch-size?"),
        ("a --qqq 5", "there is no --qqq; --help shows all there are"),
        ("a --seed many", "--seed is many; give a whole number"),
        ("a --seed 1 --seed=1.5", "--seed is 1.5; give a whole number"),
        ("a --train.batch_size x", "--train.batch-size is x; give a whole number"),
        ("a --lr fast", "--lr is fast; give a number"),
        ("a --stem big", "--stem is big; give small, imagenet"),
        ("a --train.scale 1", "--train.scale is 1; give 2 numbers"),
        ("a --train.scale 1 x --seed 1", "--train.scale is 1 x; give 2 numbers"),
        ("a --train.milestones x", "--train.milestones is x; give numbers"),
        ("a --seed --verbose", "--seed stands without a value; give a whole number"),
        ("a --data", "--data stands without a value; give one"),
        ("a --verbose yes", "'yes' belongs to no field; fields are given as --name VALUE, switches as --name or --no-name"),
        ("a --seed 1 digits", "digits stands after the fields and must stand before them: job.py digits a --seed 1"),
        ("--seed 1", "SRC must be given; --help shows what they are"),
    ],
)
def test_what_is_not_understood_is_one_sentence(text, sentence):
    with pytest.raises(UsageError) as raised:
        parse(text)
    assert str(raised.value) == sentence


def test_the_name_stands_first():
    assert commandline.take_name(["digits", "--seed", "1"], NAMES, "recipe", "digits") == ("digits", ["--seed", "1"])
    assert commandline.take_name(["--seed", "1"], NAMES, "recipe", "digits") == ("digits", ["--seed", "1"])
    assert commandline.take_name([], NAMES, "recipe", "digits") == ("digits", [])


@pytest.mark.parametrize(
    ("name", "guess"), [("cifr10", "cifar10_resnet18"), ("digit", "digits"), ("resnet50", "in1k_resnet50")]
)
def test_a_mistyped_name_gets_the_nearest(name, guess):
    sentence = f"there is no recipe '{name}'; did you mean {guess}? There are digits, cifar10_resnet18, in1k_resnet50"
    with pytest.raises(UsageError) as raised:
        commandline.take_name([name, "--seed", "1"], NAMES, "recipe", "digits")
    assert str(raised.value) == sentence


def test_a_name_like_no_other_gets_them_all():
    with pytest.raises(UsageError, match="there is no recipe ''; there are digits, cifar10_resnet18, in1k_resnet50$"):
        commandline.take_name([""], NAMES, "recipe", "digits")


def ends_with(error: BaseException | None) -> int:
    def job() -> None:
        if error is not None:
            raise error

    return commandline.run(job, again="it goes on")


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (None, 0, ""),
        (RunError("no disk; free some"), 1, "error: no disk; free some\n"),
        (PermissionError(13, "Permission denied", "/x"), 1, "error: [Errno 13] Permission denied: '/x'\n"),
        (UsageError("seed is -1; give 0"), 2, "error: seed is -1; give 0\n"),
        (KeyboardInterrupt(), 130, "stopped; it goes on\n"),
    ],
)
def test_each_end_has_its_exit_code_and_its_words(capsys, error, status, said):
    assert ends_with(error) == status
    assert capsys.readouterr().err == said


def test_an_error_of_the_program_is_not_hidden():
    with pytest.raises(ZeroDivisionError):
        ends_with(ZeroDivisionError())


def test_sigterm_is_told_from_ctrl_c_and_its_handler_is_put_back(capsys):
    before, interrupt = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background ignores Ctrl-C
    assert commandline.run(lambda: os.kill(os.getpid(), signal.SIGTERM), again="it goes on") == 143
    assert capsys.readouterr().err == "stopped by SIGTERM; it goes on\n"
    assert commandline.run(lambda: signal.raise_signal(signal.SIGINT), again="it goes on") == 130
    signal.signal(signal.SIGINT, interrupt)
    assert signal.getsignal(signal.SIGTERM) is before
