"""The transformer block that GPT-2 and BERT are made of (Vaswani et al., "Attention Is All You Need", 2017)."""

from typing import Literal

import torch
from torch import nn
from torch.nn import functional


class Attention(nn.Module):
    """Multi-head self-attention; `causal`: no position sees a later one.

    One matrix for queries, keys and values: one large product on the device instead of three. The softmax is torch's
    scaled_dot_product_attention, which takes a flash kernel where there is one.
    """

    def __init__(self, width: int, heads: int, dropout: float, causal: bool) -> None:
        super().__init__()
        self.heads, self.dropout, self.causal = heads, dropout, causal
        self.inputs = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(n, length, width) -> the same shape."""
        n, length, width = x.shape
        query, key, value = self.inputs(x).view(n, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        seen = functional.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=self.causal)
        return self.output(seen.transpose(1, 2).reshape(n, length, width))


class Block(nn.Module):
    """Attention, then two layers with GELU four times as wide, each added to its input.

    order: "pre", normalised before each part (GPT-2), or "post", after each sum (BERT). gelu: torch's `approximate`;
    GPT-2 has the tanh form, BERT the exact one. epsilon: of the normalisations.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        dropout: float,
        causal: bool,
        order: Literal["pre", "post"],
        gelu: Literal["tanh", "none"],
        epsilon: float,
    ) -> None:
        super().__init__()
        self.order, self.gelu = order, gelu
        self.attention = Attention(width, heads, dropout, causal)
        self.attention_norm = nn.LayerNorm(width, epsilon)
        self.wide = nn.Linear(width, 4 * width)
        self.narrow = nn.Linear(4 * width, width)
        self.narrow_norm = nn.LayerNorm(width, epsilon)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(n, length, width) -> the same shape."""
        if self.order == "pre":
            x = x + self.dropout(self.attention(self.attention_norm(x)))
            return x + self.dropout(self._layers(self.narrow_norm(x)))
        x = self.attention_norm(x + self.dropout(self.attention(x)))
        return self.narrow_norm(x + self.dropout(self._layers(x)))

    def _layers(self, x: torch.Tensor) -> torch.Tensor:
        return self.narrow(functional.gelu(self.wide(x), approximate=self.gelu))


def check_sizes(dropout: float, **sizes: int) -> None:
    """Raises ValueError for sizes of which no transformer can be made: layers, heads, width, context, ..."""
    for name, value in sizes.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} = {value} is no positive whole number")
    if sizes["width"] % sizes["heads"]:
        raise ValueError(f"width = {sizes['width']} cannot be divided among heads = {sizes['heads']}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout = {dropout} is not in [0, 1)")
