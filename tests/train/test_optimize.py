"""From summed gradients to new weights: schedules, clipping, loss scale, and LARS and LAMB by their formulas."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

from hpc_train.core.settings import Train
from hpc_train.train.optimize import Optimizer, learning_rate
from hpc_train.train.reduce.sharded_weights import ParamShard


def settings(**keys: object) -> Train:
    return Train.model_validate({"steps": 100, "global_batch": 8, **keys})


def optimizer(train: Train, *parameters: nn.Parameter, decays: bool = True) -> Optimizer:
    owned = [ParamShard(str(index), parameter, decays) for index, parameter in enumerate(parameters)]
    return Optimizer(train, owned, 8, lambda value: value)


def parameter(values: list[list[float]], gradient: list[list[float]]) -> nn.Parameter:
    made = nn.Parameter(torch.tensor(values))
    made.grad = torch.tensor(gradient)
    return made


@pytest.mark.parametrize(
    "keys, expected",
    [
        ({}, {0: 0.1, 99: 0.1}),
        ({"schedule": "linear"}, {0: 0.1, 50: 0.05, 99: 0.001}),
        ({"schedule": "cosine"}, {0: 0.1, 50: 0.05, 25: 0.05 * (1 + math.sqrt(0.5))}),
        ({"schedule": "step"}, {0: 0.1, 33: 0.1, 34: 0.01, 67: 0.001, 89: 0.0001}),
        ({"lr_warmup_steps": 10}, {0: 0.01, 4: 0.05, 9: 0.1, 10: 0.1}),
        ({"lr_warmup_steps": 20, "schedule": "linear"}, {19: 0.1, 20: 0.1, 60: 0.05}),
        ({"lr_reference_batch": 2}, {0: 0.4, 99: 0.4}),  # a batch four times as large, four times the rate
        ({"lr_reference_batch": 2, "lr_warmup_steps": 3}, {0: 0.2, 1: 0.3, 2: 0.4, 3: 0.4}),  # from the rate given
    ],
)
def test_learning_rates(keys: dict[str, object], expected: dict[int, float]) -> None:
    for step, rate in expected.items():
        assert learning_rate(settings(lr=0.1, **keys), step, batch_size=8) == pytest.approx(rate), step


def test_a_gradient_is_clipped_over_the_whole_model() -> None:
    one, other = parameter([[0.0]], [[3.0]]), parameter([[0.0]], [[4.0]])
    optimizer(settings(lr=1.0, clip_norm=1.0), one, other).step(0)
    assert (one.item(), other.item()) == pytest.approx((-0.6, -0.8), abs=1e-5), "the direction stays"
    short = parameter([[0.0]], [[0.5]])
    optimizer(settings(lr=1.0, clip_norm=1.0), short).step(0)
    assert short.item() == -0.5


def test_rates_of_their_own_are_those_of_parameter_groups() -> None:
    """As torch's own optimizer with a group for each rate; the last pattern that fits counts."""
    start = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(0))
    for keys, make in (
        ({"optimizer": "sgd", "momentum": 0.9}, lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9)),
        ({"optimizer": "adamw"}, lambda groups: torch.optim.AdamW(groups, lr=0.1, weight_decay=0.0)),
    ):
        ours, theirs = ([nn.Parameter(each.clone()) for each in start] for _ in range(2))
        train = settings(lr=0.1, rates={"*": 0.5, "1": 10.0, "2": 2.0, "[2]": 3.0}, **keys)
        mine = optimizer(train, *ours)
        torchs = make([{"params": [each], "lr": 0.1 * rate} for each, rate in zip(theirs, (0.5, 10, 3), strict=True)])
        for step in range(3):
            for one, other in zip(ours, theirs, strict=True):
                one.grad, other.grad = one.detach() + step, other.detach() + step
            mine.step(step)
            torchs.step()
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other)


def test_the_norm_is_that_of_all_parts() -> None:
    """Where ranks own parts, their squares are added up: here another rank owns 4 of a gradient of 5."""
    mine = parameter([[0.0]], [[3.0]])
    Optimizer(settings(lr=1.0, clip_norm=1.0), [ParamShard("a", mine, True)], 8, lambda squares: squares + 16).step(0)
    assert mine.item() == pytest.approx(-0.6, abs=1e-5)


def test_weight_decay_is_for_matrices() -> None:
    matrix, vector = parameter([[1.0]], [[0.0]]), parameter([[1.0]], [[0.0]])
    train = settings(lr=0.1, weight_decay=0.5)
    optimizer(train, matrix).step(0)
    optimizer(train, vector, decays=False).step(0)
    assert (matrix.item(), vector.item()) == pytest.approx((0.95, 1.0))


def test_the_scale_of_fp16_falls_with_an_overflow_and_leaves_that_update_out() -> None:
    weight = parameter([[1.0]], [[math.inf]])
    made = optimizer(settings(lr=1.0, precision="fp16"), weight)
    assert not made.step(0)
    made.end_step(made=False, overflowed=True)
    assert (made.scale, made.num_skipped_in_a_row) == (2.0**15, 1) and weight.item() == 1.0
    again = optimizer(settings(precision="fp16"), parameter([[1.0]], [[0.0]]))
    again.loss_scale = made.loss_scale
    assert (again.scale, again.num_skipped_in_a_row) == (2.0**15, 1)
    weight.grad = torch.tensor([[0.5 * made.scale]])
    assert made.step(1)
    made.end_step(made=True, overflowed=False)
    assert weight.item() == 0.5, "the gradient came back to its own size"
    assert (made.scale, made.num_skipped_in_a_row) == (2.0**15, 0)
    made.loss_scale = [2.0**15, 1999]  # as earlier versions kept it
    made.end_step(made=True, overflowed=False)
    assert made.scale == 2.0**16, "it grows after a long time without"


@pytest.mark.parametrize("num_shares", [1, 3, 1024])
def test_what_backward_computes_with_does_not_depend_on_the_number_of_ranks(num_shares: int) -> None:
    weight = parameter([[1.0]], [[0.0]])
    owned = [ParamShard("weight", weight, True)]
    made = Optimizer(settings(lr=1.0, precision="fp16"), owned, 8, lambda value: value, num_shares)
    assert 1 <= made.scale / num_shares / 2.0**16 < 2, "a share of the loss is 1/N of it"
    weight.grad = torch.tensor([[0.5 * made.scale]])
    assert made.step(0) and weight.item() == 0.5
    assert made.loss_scale[0] == 2.0**16, "a run resumes on any number of ranks"


@pytest.mark.parametrize("name", ["sgd", "adamw", "lars", "lamb"])
@pytest.mark.parametrize("clip_norm", [0.0, 1.0])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 1e25])
def test_a_gradient_that_is_not_finite_reaches_neither_weights_nor_what_is_kept(
    name: str, clip_norm: float, precision: str, value: float
) -> None:
    """Nor does one whose square is not: Adam's second moment would be infinite, and that weight would never change."""
    weight, vector = parameter([[1.0, 2.0]], [[0.5, 0.5]]), nn.Parameter(torch.ones(2))
    vector.grad = torch.ones(2)
    train = settings(optimizer=name, lr=0.1, momentum=0.9, clip_norm=clip_norm, precision=precision)
    made = optimizer(train, weight, vector)
    assert made.step(0)
    kept = {name: {key: each.clone() for key, each in of.items()} for name, of in made.state().items()}
    weights = [weight.detach().clone(), vector.detach().clone()]
    vector.grad = torch.tensor([0.1, value])
    assert not made.step(1)
    assert torch.equal(weight, weights[0]) and torch.equal(vector, weights[1])
    for parameter_name, of in kept.items():
        assert all(torch.equal(made.state()[parameter_name][key], each) for key, each in of.items())


def test_lars_steps_by_the_lengths_of_layers() -> None:
    """You et al. 2017, algorithm 1: two steps with momentum, by hand."""
    weight = parameter([[3.0, 4.0]], [[0.0, 2.0]])  # lengths 5 and 2
    made = optimizer(settings(optimizer="lars", lr=1.0, momentum=0.5, weight_decay=0.1), weight)
    local = 0.001 * 5 / (2 + 0.1 * 5)
    speed = torch.tensor([[0.3, 2.4]]) * local
    made.step(0)
    assert torch.allclose(weight.detach(), torch.tensor([[3.0, 4.0]]) - speed)
    before = weight.detach().clone()
    local = 0.001 * before.norm() / (2 + 0.1 * before.norm())
    speed = 0.5 * speed + local * (torch.tensor([[0.0, 2.0]]) + 0.1 * before)
    made.step(1)
    assert torch.allclose(weight.detach(), before - speed)


def test_lamb_steps_by_the_lengths_of_layers() -> None:
    """You et al. 2020, algorithm 2; the first step of Adam has the gradient's signs."""
    weight = parameter([[3.0, 4.0]], [[1.0, -2.0]])
    optimizer(settings(optimizer="lamb", lr=0.1, weight_decay=0.1), weight).step(0)
    update = torch.tensor([[1.0, -1.0]]) + 0.1 * torch.tensor([[3.0, 4.0]])
    expected = torch.tensor([[3.0, 4.0]]) - 0.1 * 5 / update.norm() * update
    assert torch.allclose(weight.detach(), expected, atol=1e-5)


@pytest.mark.parametrize("name", ["lars", "lamb"])
def test_vectors_and_zero_weights_are_not_scaled_to_nothing(name: str) -> None:
    vector = nn.Parameter(torch.zeros(2))
    vector.grad = torch.ones(2)
    matrix = parameter([[0.0]], [[1.0]])
    optimizer(settings(optimizer=name, lr=0.1), vector, matrix).step(0)
    assert torch.allclose(vector.detach(), torch.full((2,), -0.1), atol=1e-5)
    assert matrix.item() == pytest.approx(-0.1, abs=1e-5)


def test_the_configured_learning_rate_wins_over_a_saved_one() -> None:
    first = optimizer(settings(optimizer="adamw", lr=1.0), parameter([[0.0]], [[1.0]]))
    first.step(0)
    weight = parameter([[0.0]], [[1.0]])
    second = optimizer(settings(optimizer="adamw", lr=1e-3), weight)
    second.load(first.state())
    second.step(1)
    assert weight.item() == pytest.approx(-1e-3, rel=1e-3)


@pytest.mark.parametrize(
    "keys, theirs",
    [
        ({"optimizer": "sgd", "lr": 0.1}, lambda groups: torch.optim.SGD(groups, lr=0.1, fused=True)),
        (
            {"optimizer": "sgd", "lr": 0.1, "momentum": 0.9},
            lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9, fused=True),
        ),
        (
            {"optimizer": "adamw", "lr": 0.01, "betas": [0.8, 0.99]},
            lambda groups: torch.optim.AdamW(groups, lr=0.01, betas=(0.8, 0.99), fused=True),
        ),
    ],
)
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_updates_are_those_of_torchs_optimizers(
    keys: dict[str, object], theirs: Callable[[list[dict[str, object]]], torch.optim.Optimizer], decay: float
) -> None:
    """To the bit, a change half-way to what was kept included."""
    torch.manual_seed(0)
    first = [torch.randn(3, 4), torch.randn(4)]
    ours, others = ([nn.Parameter(each.clone()) for each in first] for _ in range(2))
    owned = [ParamShard("matrix", ours[0], True), ParamShard("vector", ours[1], False)]
    train = settings(weight_decay=decay, **keys)
    mine = Optimizer(train, owned, 8, lambda value: value)
    reference = theirs([{"params": others[0], "weight_decay": decay}, {"params": others[1], "weight_decay": 0.0}])
    for step in range(6):
        for one, other in zip(ours, others, strict=True):
            one.grad = torch.randn(one.shape)
            other.grad = one.grad.clone()
        if step == 3:
            kept, mine = mine.state(), Optimizer(train, owned, 8, lambda value: value)
            mine.load(kept)
        mine.step(step)
        reference.step()
        assert all(torch.equal(one, other) for one, other in zip(ours, others, strict=True))


@pytest.mark.parametrize("name", ["sgd", "adamw"])
@pytest.mark.parametrize("weights, gradients", [((1, 3), (4, 1)), ((4, 1), (1, 3)), ((8, 1), (4, 1)), ((1, 3), (1, 3))])
def test_tensors_may_lie_in_memory_as_they_like(
    name: str, weights: tuple[int, int], gradients: tuple[int, int]
) -> None:
    """torch's fused updates would mix up the numbers of these, without a word."""

    def placed(values: torch.Tensor, stride: tuple[int, int]) -> torch.Tensor:
        return torch.empty_strided((3, 4), stride).copy_(values)

    torch.manual_seed(0)
    first, changes = torch.randn(3, 4), torch.randn(4, 3, 4)
    plain, odd = nn.Parameter(first.clone()), nn.Parameter(placed(first, weights))
    train = settings(optimizer=name, lr=0.1, momentum=0.9 if name == "sgd" else 0.0, weight_decay=0.1)
    optimizers = [optimizer(train, each) for each in (plain, odd)]
    for step, change in enumerate(changes):
        plain.grad, odd.grad = change.clone(), placed(change, gradients)
        for number, each in enumerate(optimizers):
            each.step(step)
            if step == 1:  # what is continued from was kept in another order
                kept = optimizers[0].state()
                optimizers[number] = optimizer(train, (plain, odd)[number])
                copied = {name: {key: value.clone() for key, value in each.items()} for name, each in kept.items()}
                optimizers[number].load(copied)
        assert torch.allclose(plain, odd, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_a_parameter_may_be_used_for_the_first_time_later(name: str) -> None:
    early, late, alone = (parameter([[0.0]], [[1.0]]) for _ in range(3))
    train = settings(optimizer=name, lr=0.1, momentum=0.9 if name == "sgd" else 0.0)
    both, only = optimizer(train, early, late), optimizer(train, alone)
    late.grad = None
    both.step(0)
    late.grad = torch.ones(1, 1)
    both.step(1)
    only.step(0)
    assert late.item() == pytest.approx(alone.item())
