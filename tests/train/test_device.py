"""What a step costs a device, how batches get there, and models whose blocks are computed again."""

from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from hpc_train.core.errors import UserError
from hpc_train.core.settings import Train
from hpc_train.core.world import World
from hpc_train.train.data.dataset import Batch
from hpc_train.train.data.device_queue import moved
from hpc_train.train.device import count_flops, open_device, peak_flops, recompute_blocks
from hpc_train.train.reduce.gpus import check_gpus

CPU = torch.device("cpu")


def settings(**keys: object) -> Train:
    return Train.model_validate({"steps": 1, "global_batch": 1, **keys})


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.gelu(self.linear(x))


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.norm = nn.BatchNorm1d(16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


def test_operations_are_counted_and_the_model_stays_as_it_was() -> None:
    model, x = Stack(), torch.randn(8, 16)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    # 2 n a b for a product; backward makes two more of each layer but the first, whose input needs no gradient.
    assert count_flops(lambda: model(x).square().sum(), model) == 2 * 8 * 16 * 16 * (3 + 3 + 2)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_attention_counts() -> None:
    """Scores and values forward, 2 * 2 n^2 d a head; backward two and a half times that, as flash attention does it."""
    q = torch.randn(1, 2, 32, 8, requires_grad=True)
    counted = count_flops(lambda: functional.scaled_dot_product_attention(q, q, q, is_causal=True).sum(), nn.Module())
    forward = 2 * 2 * 2 * 32 * 32 * 8
    assert 3 * forward <= counted <= 3.5 * forward


def test_operations_are_those_that_torch_counts() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), nn.Flatten(), nn.Linear(1152, 5))
    x = torch.randn(4, 3, 16, 16)
    with FlopCounterMode(display=False) as counter:
        functional.cross_entropy(model(x), torch.arange(4)).backward()
    assert count_flops(lambda: functional.cross_entropy(model(x), torch.arange(4)), model) == counter.get_total_flops()


def test_blocks_are_computed_again_with_the_same_gradients() -> None:
    torch.manual_seed(0)
    model, x, calls = Stack(), torch.randn(8, 16), 0

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        model(x).square().sum().backward()
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    plain = gradients()
    model.blocks[0].linear.register_forward_hook(count)
    recompute_blocks(model)
    assert all(torch.equal(one, other) for one, other in zip(plain, gradients(), strict=True)) and calls == 2
    with pytest.raises(UserError, match="Linear has no blocks"):
        recompute_blocks(nn.Linear(1, 1))


def test_batches_of_any_form_are_moved() -> None:
    class Pair(NamedTuple):
        x: torch.Tensor
        name: str

    batch = Batch(torch.zeros(2, 3, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64), 0.5, 0.0)
    there = moved([batch, (torch.ones(1), {"a": Pair(torch.ones(2), "x")}), 3, np.float64(1)], torch.device("meta"))
    assert there[0].inputs.is_meta and there[0].targets.is_meta and there[0].scale == 0.5
    assert there[1][0].is_meta and there[1][1]["a"].x.is_meta and there[1][1]["a"].name == "x" and there[2:] == [3, 1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused() -> None:
    assert open_device(settings(), World()) == CPU and open_device(settings(device="cpu"), World()) == CPU
    with pytest.raises(UserError, match=r"train\.device = 'cuda', and torch .* finds no GPU on localhost"):
        open_device(settings(device="cuda"), World())


def test_the_peak_is_given_or_unknown() -> None:
    assert peak_flops(settings(), CPU) == (None, None)
    assert peak_flops(settings(peak_tflops=1.5), CPU) == (1.5e12, "train.peak_tflops")


def test_ranks_that_share_a_gpu_are_named_before_nccl_ends_the_job() -> None:
    check_gpus("horovod", [None, None])  # CPUs, or a Horovod that reduces through these
    check_gpus("horovod", [("a", "0"), ("a", "1"), ("b", "0"), ("b", "1")])
    with pytest.raises(UserError, match=r"reduce\.strategy = 'horovod': ranks 1, 3 share one GPU of b, and NCCL needs"):
        check_gpus("horovod", [("a", "0"), ("b", "0"), ("b", "1"), ("b", "0")])
