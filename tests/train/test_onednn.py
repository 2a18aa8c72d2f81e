"""oneDNN's bug 6035 (train/onednn.py): the models that come with the program avoid it, others are warned about."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

from hpc_train.train.models import classifier
from hpc_train.train.onednn import (
    MALLOC_CHECKED,
    compile_model,
    exposed_layers,
    is_channels_last,
    warn_of_channels_last,
)
from tests import jobs

RESNETS = [
    ("resnet", {"depth": depth, "width": 4, "stem": stem}) for depth in (18, 50) for stem in ("small", "imagenet")
]
VGGS = [("vgg", {"depth": 11, "width": 4, "hidden": [8], "dropout": 0.0, "batch_norm": norm}) for norm in (False, True)]
SHAPES = [(28, 28), (64, 64, 3), (3, 128, 96), (128, 128, 1)]


def gradients(model: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    model.zero_grad()
    functional.cross_entropy(model(inputs), torch.arange(len(inputs)) % 10).backward()
    return torch.cat([parameter.grad.double().flatten() for parameter in model.parameters()])


def made(name: str, shape: tuple[int, ...], options: dict[str, object]) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    return classifier(name, shape, 10, options), torch.rand(2, *shape)


def compare_with_float64() -> None:
    """Every picture model at every size, in a process of its own; prints the worst difference, a share of the norm."""
    torch.set_num_threads(1)
    worst = 0.0
    for name, options in RESNETS + VGGS:
        for shape in SHAPES:
            model, inputs = made(name, shape, options)
            found = [gradients(model, inputs) for _ in range(2)]
            exact = gradients(model.double(), inputs.double())
            worst = max(worst, *(float((each - exact).norm() / exact.norm()) for each in found))
    print(worst)


def train_compiled() -> None:
    model, inputs = made("resnet", (128, 128, 3), {"depth": 18, "width": 8, "stem": "small"})
    exact = gradients(model.double(), inputs.double())
    found = [gradients(compile_model(model.float(), torch.device("cpu")), inputs) for _ in range(20)]
    print(max(float((each - exact).norm() / exact.norm()) for each in found))


def in_checked_process(function: str) -> float:
    """What `function` of this file prints; glibc ends a process that has written where it must not."""
    code = f"from tests.train import test_onednn; test_onednn.{function}()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=jobs.ROOT,
        env=jobs.environment(**MALLOC_CHECKED),
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])
    return float(done.stdout)


def test_gradients_of_all_picture_models_are_those_of_float64() -> None:
    """A ReLU that rounding switches moves a gradient by some 1e-3 of its norm."""
    assert in_checked_process("compare_with_float64") < 0.01


@pytest.mark.thorough
def test_gradients_of_a_compiled_model_are_those_of_float64() -> None:
    assert in_checked_process("train_compiled") < 0.01


@pytest.mark.parametrize("name, options", RESNETS + VGGS)
@pytest.mark.parametrize("shape", SHAPES)
def test_no_convolution_of_ours_sees_channels_last_on_a_cpu(
    name: str, options: dict[str, object], shape: tuple[int, ...]
) -> None:
    model, inputs = made(name, shape, options)
    seen: list[bool] = []
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_pre_hook(lambda _, given: seen.append(is_channels_last(given[0])))
    model(inputs)
    assert seen and not any(seen)


def test_layouts_are_recognised_as_by_torch() -> None:
    suggested = torch._prims_common.suggest_memory_format
    for shape in ((2, 3, 4, 5), (2, 1, 4, 5), (1, 3, 1, 1), (16, 8, 1, 1), (1, 1, 1, 1), (2, 3, 1, 5)):
        for memory_format in (torch.contiguous_format, torch.channels_last):
            x = torch.empty(shape).to(memory_format=memory_format)
            assert is_channels_last(x) == (suggested(x) == torch.channels_last), (shape, memory_format)
    moved = torch.empty(2, 4, 5, 1).movedim(3, 1)
    assert is_channels_last(moved) and moved.is_contiguous(), "a single channel can mean both"


def test_layers_that_meet_the_bug() -> None:
    model = nn.Sequential(
        nn.Conv2d(8, 16, 1, 2),
        nn.Conv2d(16, 16, 1, 2),
        nn.Conv2d(8, 16, 1, 1),
        nn.Conv2d(8, 16, 3, 2),
        nn.Conv2d(8, 16, 1, (1, 2)),
        nn.ConvTranspose2d(16, 8, 1, 2),
        nn.ConvTranspose2d(8, 16, 1, 2),
        nn.Conv2d(8, 16, 1, 2, groups=2),
    )
    assert list(exposed_layers(model)) == ["0", "4", "5"]


def test_a_layer_that_meets_the_bug_is_warned_about_once() -> None:
    warnings: list[str] = []
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, 1, 2))
    pictures = torch.rand(2, 3, 9, 9)
    with warn_of_channels_last(model, warnings.append):
        model(pictures)
        assert not warnings
        for _ in range(2):
            model(pictures.to(memory_format=torch.channels_last))
    assert len(warnings) == 1 and "layer 1 (Conv2d(8, 16" in warnings[0] and "bug 6035" in warnings[0]
    model(pictures.to(memory_format=torch.channels_last))
    assert len(warnings) == 1, "the hooks are gone"
    with warn_of_channels_last(model.to(memory_format=torch.channels_last), warnings.append):
        model(pictures)
    assert len(warnings) == 2, "weights alone are enough"


TASK = """
import torch
from torch import nn
from hpc_train.train.tasks.classification import Classification

class Mine(Classification):
    def model(self):
        # Pictures of 28 and 1: odd after the first, where the bug does not write; this test is about the words.
        return nn.Sequential(nn.Unflatten(1, (1, 28)), nn.Conv2d(1, 8, (2, 2)), Last(), nn.Conv2d(8, 16, 1, 2), Head())

class Last(nn.Module):
    def forward(self, x):
        return x.contiguous(memory_format=torch.channels_last)

class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.out = nn.Linear(16, 10)
    def forward(self, x):
        return self.out(x.mean((2, 3)))
"""


def test_a_users_own_model_is_warned_about_before_the_first_step(tmp_path: Path, digits: Path) -> None:
    (tmp_path / "mine.py").write_text(TASK)
    keys = jobs.settings(
        task__kind="mine:Mine", data__file=digits, train__steps=1, train__global_batch=8, reduce__strategy="mpi"
    )
    done = jobs.run(2, "train", jobs.CONFIGS / "softmax-mnist.toml", *keys, cwd=tmp_path)
    assert done.code == 0, done
    assert done.err.count("warning: layer 3 (Conv2d(8, 16") == 1 and "x.contiguous()" in done.err, done.err
