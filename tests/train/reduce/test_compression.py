"""Gradients in 16 bits: what arrives does not depend on how many ranks share them, nor on their size."""

import math

import pytest
import torch

from hpc_train.train.reduce.compression import compress, decompress

KINDS = [(torch.float16, 2.0**-11), (torch.bfloat16, 2.0**-8)]  # with half the distance of neighbouring numbers


def mean_by(shares: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What every rank has in the end of a row a rank: both hops of a sum in 16 bits."""
    total = decompress(compress(shares, dtype)).sum(0)
    return decompress(compress(total[None], dtype))[0]


@pytest.mark.parametrize("dtype, relative", KINDS)
@pytest.mark.parametrize("mean", [1e-5, 1e-12, 1.0, 1e30])
def test_a_mean_gradient_arrives_at_1024_ranks(mean: float, dtype: torch.dtype, relative: float) -> None:
    torch.manual_seed(0)
    own = mean * (1 + torch.rand(1024, 64))  # each rank's mean gradient, of which it sends 1/1024
    arrived = mean_by(own / 1024, dtype)
    assert torch.allclose(arrived, own.mean(0), rtol=2 * relative, atol=0)
    assert torch.equal(arrived, mean_by(own / 1024 * 2.0**16, dtype) / 2.0**16), "nor on the loss scale"


@pytest.mark.parametrize("dtype, relative", KINDS)
def test_each_row_keeps_its_size(dtype: torch.dtype, relative: float) -> None:
    sizes = torch.tensor([3.3e38, 65504.0, 1e-5, 1.2e-38, 1e-44, 0.0])
    rows = sizes[:, None] * torch.tensor([1.0, -0.5, 0.123, 0.0])
    back = decompress(compress(rows, dtype))
    assert back.dtype == torch.float32
    assert torch.allclose(back, rows, rtol=relative, atol=2e-45)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_stays_so(value: float, dtype: torch.dtype) -> None:
    rows = torch.full((3, 5), 1e-5)
    rows[1, 2] = value
    arrived = mean_by(rows, dtype)
    assert not torch.isfinite(arrived[2]) and torch.isfinite(arrived[[0, 1, 3, 4]]).all()
