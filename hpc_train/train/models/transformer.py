"""The transformer blocks of GPT-2 and BERT (Vaswani et al., "Attention Is All You Need", 2017)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.nn import functional


class Attention(nn.Module):
    """Multi-head self-attention; `causal`: no position sees a later one.

    One matrix for queries, keys and values makes one large product instead of three. torch's
    scaled_dot_product_attention uses a flash kernel if there is one.
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


@dataclass(frozen=True)
class BlockForm:
    """What distinguishes the blocks of GPT-2 from those of BERT."""

    causal: bool  # no position sees a later one
    norm: Literal["pre", "post"]  # normalised before each part, or after each sum
    gelu: Literal["tanh", "none"]  # torch's `approximate`: the tanh form, or the exact one
    epsilon: float  # of the normalisations


GPT_2 = BlockForm(causal=True, norm="pre", gelu="tanh", epsilon=1e-5)
BERT = BlockForm(causal=False, norm="post", gelu="none", epsilon=1e-12)


class Block(nn.Module):
    """Attention, then two layers with GELU four times as wide, each added to its input."""

    def __init__(self, width: int, heads: int, dropout: float, form: BlockForm) -> None:
        super().__init__()
        self.form = form
        self.attention = Attention(width, heads, dropout, form.causal)
        self.attention_norm = nn.LayerNorm(width, form.epsilon)
        self.wide = nn.Linear(width, 4 * width)
        self.narrow = nn.Linear(4 * width, width)
        self.narrow_norm = nn.LayerNorm(width, form.epsilon)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(n, length, width) -> the same shape."""
        if self.form.norm == "pre":
            x = x + self.dropout(self.attention(self.attention_norm(x)))
            return x + self.dropout(self._layers(self.narrow_norm(x)))
        x = self.attention_norm(x + self.dropout(self.attention(x)))
        return self.narrow_norm(x + self.dropout(self._layers(x)))

    def _layers(self, x: torch.Tensor) -> torch.Tensor:
        return self.narrow(functional.gelu(self.wide(x), approximate=self.form.gelu))


def initialise(model: nn.Module, draw: Callable[[torch.Tensor], object]) -> None:
    """Draws the weights of all linear layers and embeddings; biases begin as zero."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            draw(module.weight)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)


def check_sizes(dropout: float, **sizes: int) -> None:
    """Raises ValueError for sizes that no transformer can have: layers, heads, width, context, ..."""
    for name, value in sizes.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} = {value} is not a positive integer")
    if sizes["width"] % sizes["heads"]:
        raise ValueError(f"width = {sizes['width']} cannot be divided among heads = {sizes['heads']}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout = {dropout} is not in [0, 1)")
