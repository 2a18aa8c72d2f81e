"""Initial weights are a function of the seed and their name, with the values that the constructor decides on."""

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from hpc_train.train.initial_weights import build
from hpc_train.train.models.bert import Bert
from hpc_train.train.models.gpt import Gpt
from hpc_train.train.models.mlp import Mlp
from hpc_train.train.models.resnet import ResNet
from hpc_train.train.models.softmax import Softmax
from hpc_train.train.models.vgg import Vgg

SHIPPED: dict[str, Callable[[], nn.Module]] = {
    "softmax": lambda: Softmax((784,), 10),
    "mlp": lambda: Mlp((784,), 10),
    "resnet": lambda: ResNet((3, 32, 32), 10, depth=18, width=16, stem="small"),
    "vgg": lambda: Vgg((3, 32, 32), 10),
    "gpt": lambda: Gpt(300, layers=2, heads=2, width=64, context=32),
    "bert": lambda: Bert(300, layers=2, heads=2, width=64, context=32),
}


class Own(nn.Module):
    """A user's: tied weights, buffers, raw parameters, scaling in place, a frozen weight, a copy, plain tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(50, 16, padding_idx=3)
        self.inner = nn.Linear(16, 16)
        self.output = nn.Linear(16, 50)
        self.output.weight = self.tokens.weight
        self.raw = nn.Parameter(torch.randn(40, 16) * 0.02)
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)
        self.register_buffer("scale", torch.tensor([1.0, 2.0, 4.0]))
        self.register_buffer("noise", torch.rand(5, dtype=torch.float64))
        self.register_buffer("from_numpy", torch.from_numpy(np.arange(3)))
        self.norm = nn.BatchNorm1d(16)
        nn.init.orthogonal_(self.inner.weight)
        nn.init.trunc_normal_(self.raw, std=0.5)
        with torch.no_grad():
            self.inner.weight[0] *= 3
            self.raw[1:3, 2] = 7.0
        self.target = nn.Linear(16, 16)
        self.target.load_state_dict(self.inner.state_dict())
        self.plain = torch.arange(4.0)
        self.several = [torch.full((2,), 5.0)]
        self.row = self.raw.detach()[1]


class Reads(nn.Module):
    """Reads a value while it is made, so it cannot run on meta."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(30))
        self.scale = self.weight.std().item()


def digest(model: nn.Module) -> str:
    whole = hashlib.sha256()
    for name, each in model.state_dict().items():
        whole.update(name.encode() + each.numpy().tobytes())
    return whole.hexdigest()


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_models_keep_their_distributions(name: str) -> None:
    initial = build(SHIPPED[name], seed=1)
    drawn = {key: initial.draw(key) for key in initial.model.state_dict()}
    before = initial.model
    model = initial.materialise()
    assert initial.whole_because is None and model is before
    torch.manual_seed(1)
    usual = SHIPPED[name]().state_dict()
    state = model.state_dict()
    assert state.keys() == usual.keys()
    for key, value in usual.items():
        mine = state[key]
        assert torch.equal(mine, drawn[key]) and (mine.dtype, mine.shape) == (value.dtype, value.shape)
        assert mine.stride() == value.stride() and mine.device == value.device
        if value.numel() < 2 or value.unique().numel() == 1:
            assert torch.equal(mine, value), key
        else:  # five standard errors of a uniform or normal sample's deviation and mean
            bound = 5 / value.numel() ** 0.5
            assert abs(mine.std() / value.std() - 1) < bound and abs(mine.mean()) < bound * value.std(), key
            assert not torch.equal(mine, value)
    flags = {key: each.requires_grad for key, each in SHIPPED[name]().named_parameters()}
    assert {key: each.requires_grad for key, each in model.named_parameters()} == flags
    assert digest(build(SHIPPED[name], 1).materialise()) == digest(model)
    assert (digest(build(SHIPPED[name], 2).materialise()) == digest(model)) == (name == "softmax"), "which begins as 0"


def test_a_users_constructor_decides() -> None:
    model: Any = build(Own, 4).materialise()
    assert model.output.weight is model.tokens.weight and model.tokens.weight[3].eq(0).all()
    weight = model.inner.weight.detach().clone()
    weight[0] /= 3
    assert torch.allclose(weight @ weight.T, torch.eye(16), atol=1e-5)
    assert torch.equal(model.target.weight, model.inner.weight) and torch.equal(model.target.bias, model.inner.bias)
    assert 0.4 < model.raw.std() < 0.9 and model.raw[1:3, 2].eq(7).all()
    assert model.raw.requires_grad and not model.frozen.requires_grad and model.frozen.eq(1).all()
    assert model.scale.tolist() == [1, 2, 4] and model.noise.dtype == torch.float64 and model.noise.std() > 0
    assert model.from_numpy.tolist() == [0, 1, 2] and model.norm.num_batches_tracked.item() == 0
    assert model.plain.tolist() == [0, 1, 2, 3] and model.several[0].tolist() == [5, 5]
    assert model.row.data_ptr() == model.raw[1].data_ptr(), "still a view"
    output = model.output(model.target(model.inner(model.tokens(torch.tensor([1, 2])))))
    output.sum().backward()
    assert model.tokens.weight.grad is not None and model.output.weight.grad is model.tokens.weight.grad


def test_a_weight_depends_on_its_name_and_no_other_weight() -> None:
    class One(nn.Module):
        def __init__(self, more: bool) -> None:
            super().__init__()
            if more:
                self.before = nn.Linear(7, 7)
            self.same = nn.Linear(5, 5)

    for name in ("same.weight", "same.bias"):
        assert torch.equal(build(lambda: One(True), 3).draw(name), build(lambda: One(False), 3).draw(name))
    initial = build(Own, 3)
    assert initial.whole_because is None
    names = list(initial.model.state_dict())
    backwards = {name: initial.draw(name).clone() for name in reversed(names)}
    state = initial.materialise().state_dict()
    assert all(torch.equal(backwards[name], state[name]) for name in names)
    with pytest.raises(KeyError):
        initial.draw("absent")


def test_parameters_that_are_left_out_take_no_memory() -> None:
    whole = build(Own, 3).materialise().state_dict()
    initial = build(Own, 3)
    left = {name for name, each in initial.model.named_parameters() if each.requires_grad}
    model: Any = initial.materialise(left)
    assert initial.whole_because is None and model.output.weight is model.tokens.weight
    for name, each in model.named_parameters():
        if name in left:
            assert each.untyped_storage().nbytes() == 4 and each.requires_grad and each.isnan().all()
            assert torch.equal(initial.draw(name), whole[name])
    state = model.state_dict()
    assert state.keys() == whole.keys()
    tied_or_left = left | {"output.weight"}
    assert all(torch.equal(state[name], value) for name, value in whole.items() if name not in tied_or_left)
    assert build(Own, 3).digest() == build(Own, 4).digest() == initial.digest() != build(SHIPPED["mlp"], 3).digest()


def test_the_callers_random_numbers_are_left_alone() -> None:
    initial = build(SHIPPED["mlp"], 1)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    initial.materialise()
    assert torch.equal(torch.rand(3), expected)


INITIALISERS: dict[str, Callable[[torch.Tensor], object]] = {
    "uniform": nn.init.uniform_,
    "normal": lambda each: nn.init.normal_(each, 1, 2),
    "trunc_normal": lambda each: nn.init.trunc_normal_(each, 0.1, 0.5, -1, 0.7),
    "constant": lambda each: nn.init.constant_(each, 0.3),
    "ones": nn.init.ones_,
    "zeros": nn.init.zeros_,
    "eye": nn.init.eye_,
    "xavier_uniform": nn.init.xavier_uniform_,
    "xavier_normal": nn.init.xavier_normal_,
    "kaiming_uniform": nn.init.kaiming_uniform_,
    "kaiming_normal": nn.init.kaiming_normal_,
    "orthogonal": lambda each: nn.init.orthogonal_(each, 1.3),
    "sparse": lambda each: nn.init.sparse_(each, 0.4),
    "dirac": lambda each: nn.init.dirac_(each.view(6, 2, 2)),
}


@pytest.mark.parametrize("name", INITIALISERS)
def test_replay_is_a_direct_call(name: str) -> None:
    def make() -> nn.Module:
        model = nn.Module()
        model.weight = nn.Parameter(torch.empty(6, 4))
        with torch.no_grad():
            INITIALISERS[name](model.weight)
        return model

    initial = build(make, 8)
    assert initial.whole_because is None
    seed = int.from_bytes(hashlib.sha256(b"8 weight").digest()[:8], "little")
    torch.manual_seed(seed)
    direct = torch.empty(6, 4)
    INITIALISERS[name](direct)
    assert torch.equal(initial.draw("weight"), direct)


def test_a_model_that_cannot_run_on_meta_is_made_whole() -> None:
    initial = build(Reads, 6)
    assert initial.whole_because and "item" in initial.whole_because
    torch.manual_seed(6)
    usual = Reads()
    assert torch.equal(initial.materialise().weight, usual.weight) and initial.model.scale == usual.scale  # type: ignore[arg-type]
    assert torch.equal(initial.draw("weight"), usual.weight)
    recurrent = build(lambda: nn.LSTM(4, 4), 6)
    assert recurrent.whole_because == "the model refers to weight_ih_l0 weakly"
    assert all(not each.is_meta for each in recurrent.materialise().parameters())


def test_the_constructors_own_error_is_told() -> None:
    def refuses() -> nn.Module:
        raise ValueError("layers = -1")

    with pytest.raises(ValueError, match="layers = -1"):
        build(refuses, 1)
