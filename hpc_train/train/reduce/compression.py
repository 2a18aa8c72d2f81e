"""Compresses gradients to 16 bits. Each row is first scaled by its own power of two, so that fp16 can hold it.

A rank's share of a mean gradient is 1/N of it. In fp16, whose smallest number is 6e-8, a mean gradient of 1e-5 would be
0 at 1,024 ranks, and sums of large ones would be infinite. So each row is scaled to the same largest number before it
is rounded, and what is sent depends neither on N nor on the loss scale.
"""

import torch

_LARGEST_EXPONENT = 15  # of a row in fp16: below 2^15, and fp16 ends at 65,504
_MAX_SHIFT = 126  # 2^126 and 2^-126 are normal numbers of float32


def compress(rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(n, m) of float32 -> (n, 1 + m) of `dtype`, float16 or bfloat16: column 0 holds the exponent of the scale.

    NaN and infinity stay what they are.
    """
    largest = torch.maximum(rows.amax(1), -rows.amin(1))
    exponents = torch.frexp(torch.nan_to_num(largest, nan=1.0, posinf=1.0)).exponent
    shifts = (_LARGEST_EXPONENT - exponents).clamp(-_MAX_SHIFT, _MAX_SHIFT)
    compressed = torch.empty(len(rows), 1 + rows.shape[1], dtype=dtype, device=rows.device)
    compressed[:, 0] = shifts  # whole numbers up to 256 are exact in both types
    torch.mul(rows, _powers_of_two(shifts), out=compressed[:, 1:])
    return compressed


def decompress(compressed: torch.Tensor) -> torch.Tensor:
    """The inverse of `compress`: (n, 1 + m) in 16 bits -> (n, m) of float32."""
    # A product of both types would take ten times as long as this conversion.
    return compressed[:, 1:].to(torch.float32).mul_(_powers_of_two(-compressed[:, 0].to(torch.int32)))


def _powers_of_two(exponents: torch.Tensor) -> torch.Tensor:
    return torch.ldexp(torch.ones(len(exponents), device=exponents.device), exponents)[:, None]
