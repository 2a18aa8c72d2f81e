"""GPT-2: a transformer that predicts the next token."""

from functools import partial

import torch
from torch import nn
from torch.nn import functional

from hpc_train.train.models.transformer import GPT_2, Block, check_sizes, initialise

_STD = 0.02  # of the paper's code, for all weights


class Gpt(nn.Module):
    """GPT-2 (Radford et al., "Language Models are Unsupervised Multitask Learners", 2019), by default 124M.

    Normalisation before each part of a block, learned positions, output weights tied to the embedding. With a
    vocabulary of 50,257 and a context of 1,024 it has 124,439,808 parameters, the model that the paper calls 117M (its
    authors corrected the count later). layers, heads, width = 24, 16, 1024 has 354,823,168.

    Weights begin as N(0, 0.02), those that write into the residual stream divided by sqrt(2 layers): the variance of
    the sum of all blocks then does not depend on their number. Biases begin as zero.

    context: the maximum number of tokens that it looks back on. dropout: the paper's 0.1 is for many epochs over the
    same text. vocab_multiple: the embedding's rows are padded to a multiple of it, as matrix units prefer 64 or 128;
    the model learns that the added tokens do not occur.
    """

    def __init__(
        self,
        vocab_size: int,
        layers: int = 12,
        heads: int = 12,
        width: int = 768,
        context: int = 1024,
        dropout: float = 0.0,
        vocab_multiple: int = 1,
    ) -> None:
        super().__init__()
        check_sizes(dropout, layers=layers, heads=heads, width=width, context=context, vocab_multiple=vocab_multiple)
        self.vocab_size, self.context = vocab_size, context
        self.tokens = nn.Embedding(-(-vocab_size // vocab_multiple) * vocab_multiple, width)
        self.positions = nn.Embedding(context, width)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(width, heads, dropout, GPT_2) for _ in range(layers))
        self.norm = nn.LayerNorm(width, GPT_2.epsilon)
        initialise(self, partial(nn.init.normal_, std=_STD))
        for name, weight in self.named_parameters():
            if name.endswith(("attention.output.weight", "narrow.weight")):
                nn.init.normal_(weight, std=_STD / (2 * layers) ** 0.5)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """(n, length) int64, length at most `context` -> logits of each next token, (n, length, vocabulary)."""
        return self.logits(self.features(tokens))

    def features(self, tokens: torch.Tensor) -> torch.Tensor:
        """(n, length) int64 -> the output of the blocks, (n, length, width)."""
        x = self.dropout(self.tokens(tokens) + self.positions.weight[: tokens.shape[1]])
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        """(..., width) -> (..., vocabulary)."""
        return functional.linear(features, self.tokens.weight)
