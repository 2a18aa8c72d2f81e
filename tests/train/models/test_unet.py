"""U-Net: the paper's size, grids of any size, fields in two and three dimensions, and what is refused."""

from typing import Any

import pytest
import torch
from torch import nn

from hpc_train.core.errors import UserError
from hpc_train.train.device import recompute_blocks
from hpc_train.train.models import regressor
from hpc_train.train.models.unet import Unet

PLANE, SPACE = (2, 16, 24), (3, 8, 16, 8)
SMALL = {"levels": 2, "width": 8}


def small(shape: tuple[int, ...], targets: tuple[int, ...] | None = None, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return regressor("unet", shape, targets or shape, {**SMALL, **options})


def test_parameters_are_the_published() -> None:
    """31,030,658 of the paper's model from one channel to two classes, as everybody builds it."""
    with torch.device("meta"):
        model = Unet((1, 572, 572), (2, 572, 572))
    norms = [part for part in model.modules() if isinstance(part, nn.GroupNorm)]
    num_scales = sum(part.num_channels for part in norms)  # beside shifts, which take the place of biases
    assert sum(each.numel() for each in model.parameters()) == 31_030_658 + num_scales


@pytest.mark.parametrize("shape", [PLANE, SPACE])
@pytest.mark.parametrize("padding", ["zeros", "circular", "replicate", "reflect"])
def test_every_form_learns(shape: tuple[int, ...], padding: str) -> None:
    """One step of gradient descent lowers the loss and changes every parameter."""
    model = small(shape, padding=padding)
    inputs, targets = torch.rand(4, *shape), torch.rand(4, *shape)
    before = (model(inputs) - targets).square().mean()
    before.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            assert parameter.grad is not None and parameter.grad.abs().max() > 0
            parameter -= 1e-2 * parameter.grad
    assert (model(inputs) - targets).square().mean() < before
    assert isinstance(model.blocks, nn.ModuleList), "blocks can be recomputed, and divided among ranks"


@pytest.mark.parametrize(
    "shape, targets, padded, padded_targets",
    [
        ((7, 6), (7, 6), (8, 8), (8, 8)),
        ((2, 13, 10), (5, 13, 10), (2, 16, 12), (5, 16, 12)),
        ((2, 13, 10), (13, 10), (2, 16, 12), (16, 12)),
        ((1, 5, 9, 4), (2, 5, 9, 4), (1, 8, 12, 4), (2, 8, 12, 4)),
        ((2, 5, 9, 4), (5, 9, 4), (2, 8, 12, 4), (8, 12, 4)),
    ],
)
def test_a_grid_of_any_size_is_that_of_a_padded_one(
    shape: tuple[int, ...], targets: tuple[int, ...], padded: tuple[int, ...], padded_targets: tuple[int, ...]
) -> None:
    inputs, larger = torch.rand(3, *shape), torch.zeros(3, *padded)
    larger[tuple(map(slice, inputs.shape))] = inputs
    with torch.no_grad():
        found = small(shape, targets)(inputs)
        expected = small(padded, padded_targets)(larger)[tuple(map(slice, found.shape))]
    assert found.shape == (3, *targets) and torch.allclose(found, expected, atol=1e-6)


def test_periodic_fields_have_no_edge() -> None:
    """What is moved by whole cells of the coarsest grid comes out moved."""
    inputs, moved = torch.rand(2, *PLANE), (0, 0, 8, 20)
    with torch.no_grad():
        for padding, is_alike in (("circular", True), ("zeros", False)):
            model = small(PLANE, padding=padding)
            found = model(inputs.roll(moved, (0, 1, 2, 3)))
            expected = model(inputs).roll(moved, (0, 1, 2, 3))
            assert torch.allclose(found, expected, atol=1e-5) is is_alike, padding


def test_a_sample_does_not_depend_on_the_others() -> None:
    """So results do not depend on how ranks share a batch, and a rank may have none."""
    model, inputs = small(PLANE), torch.rand(5, *PLANE)
    parts = [model(part) for part in inputs.split([1, 4])]
    assert torch.allclose(torch.cat(parts), model(inputs), atol=1e-5)
    nothing = model(inputs[:0])
    nothing.sum().backward()
    assert nothing.shape == (0, *PLANE) and all(not each.grad.abs().max() for each in model.parameters())


def test_a_predicted_change_begins_as_persistence() -> None:
    inputs = torch.rand(2, 2, 13, 10)
    assert torch.equal(small((2, 13, 10), residual=True)(inputs), inputs)
    assert not torch.allclose(small((2, 13, 10))(inputs), inputs, atol=0.1)


def gradients(model: nn.Module, inputs: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    model(inputs).square().sum().backward()
    return [each.grad.clone() for each in model.parameters()]


@pytest.mark.parametrize("shape", [PLANE, SPACE])
def test_recomputed_blocks_have_the_same_gradients(shape: tuple[int, ...]) -> None:
    inputs, plain, recomputed = torch.rand(2, *shape), small(shape), small(shape)
    recompute_blocks(recomputed)
    pairs = zip(gradients(plain, inputs), gradients(recomputed, inputs), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one.float() - other).abs().max() / other.abs().max())


def test_half_precision_is_near() -> None:
    model, inputs = small(PLANE), torch.rand(2, *PLANE)
    with torch.no_grad():
        exact = model(inputs)
        with torch.autocast("cpu", torch.bfloat16):
            half = model(inputs)
    assert half.dtype == torch.bfloat16 and 1e-6 < distance(half, exact) < 0.05


@pytest.mark.slow
def test_compiled_it_is_the_same() -> None:
    model, inputs = small(PLANE, padding="circular"), torch.rand(2, *PLANE)
    assert distance(torch.compile(model)(inputs), model(inputs)) < 1e-4


@pytest.mark.parametrize(
    "shape, targets", [((2, 16, 24), (2, 16, 23)), ((2, 16, 24), (3,)), ((16, 24, 2), (16, 24)), ((24,), (24,))]
)
def test_fields_on_two_grids_are_refused(shape: tuple[int, ...], targets: tuple[int, ...]) -> None:
    with pytest.raises(UserError) as error:
        regressor("unet", shape, targets, {})
    assert f"data.inputs has samples of {shape} and data.targets of {targets}" in error.value.what
    assert "channels first" in error.value.remedy


@pytest.mark.parametrize(
    "options, words",
    [
        ({"levels": -1}, "levels = -1: a whole number from 0 on"),
        ({"levels": 5}, "levels = 5: a grid of 16 x 24 cells cannot be halved as often"),
        ({"levels": 4, "padding": "reflect"}, "levels = 4: a grid of 16 x 24"),
        ({"width": 12}, "groups = 8 do not divide width = 12"),
        ({"padding": "periodic"}, "padding = 'periodic': one of zeros, circular"),
        ({"depth": 3}, "task.options.depth: unet has no such option"),
        ({"residual": True}, "residual = true: inputs have 2 channels, and targets 3"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, object], words: str) -> None:
    with pytest.raises(UserError) as error:
        regressor("unet", PLANE, (3, 16, 24), options)
    assert words in str(error.value)
