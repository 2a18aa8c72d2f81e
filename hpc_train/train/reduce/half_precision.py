"""Gradients on their way in 16 bits, whatever their size: rows of numbers with a power of two each.

A rank's share of a mean gradient is 1/N of it: in fp16, which ends at 6e-8, a mean gradient of 1e-5 would be 0 at 1,024
ranks, and sums of large ones would be infinite. So the largest number of each row is brought to the same size before
it is rounded, and what is sent does not depend on N, nor on the loss scale.
"""

import torch

_LARGEST_EXPONENT = 15  # of a row in fp16: below 2^15, and fp16 ends at 65,504
_MOST = 126  # that a row is shifted by: 2^126 and 2^-126 are ordinary numbers of float32


def packed(rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(n, m) of float32 -> (n, 1 + m) of `dtype`, float16 or bfloat16: in front of each row, what it is shifted by.

    NaN and infinity stay what they are.
    """
    largest = torch.maximum(rows.amax(1), -rows.amin(1))
    exponents = torch.frexp(torch.nan_to_num(largest, nan=1.0, posinf=1.0)).exponent
    shifts = (_LARGEST_EXPONENT - exponents).clamp(-_MOST, _MOST)
    made = torch.empty(len(rows), 1 + rows.shape[1], dtype=dtype, device=rows.device)
    made[:, 0] = shifts  # whole numbers up to 256 are exact in both
    torch.mul(rows, _powers_of_two(shifts), out=made[:, 1:])
    return made


def unpacked(made: torch.Tensor) -> torch.Tensor:
    """The opposite of `packed`: (n, 1 + m) in 16 bits -> (n, m) of float32."""
    # A product of both types takes ten times as long as this.
    return made[:, 1:].to(torch.float32).mul_(_powers_of_two(-made[:, 0].to(torch.int32)))


def _powers_of_two(exponents: torch.Tensor) -> torch.Tensor:
    return torch.ldexp(torch.ones(len(exponents), device=exponents.device), exponents)[:, None]
