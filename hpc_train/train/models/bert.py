"""BERT: a bidirectional transformer that predicts masked tokens."""

from functools import partial

import torch
from torch import nn
from torch.nn import functional

from hpc_train.train.models.transformer import BERT, Block, check_sizes, initialise

_STD = 0.02  # of the paper's code, for all weights


class Bert(nn.Module):
    """BERT (Devlin et al., "BERT: Pre-training of Deep Bidirectional Transformers", 2018), by default BERT-base.

    Normalisation after each sum, learned positions, and the masked-language head: a layer with GELU and normalisation,
    then the embedding's weights and a bias of its own. With a vocabulary of 30,522 it has 109,514,298 parameters. The
    paper's 110M are 109,482,240: 108,891,648 of the body and 590,592 of a pooler for predicting the next sentence,
    which is not trained here; they do not include the head's 622,650 (its weights are shared).
    layers, heads, width = 24, 16, 1024 is BERT-large.

    A window is one segment, so the first of the paper's two segment embeddings is added everywhere; both are kept for
    weights trained elsewhere. context: the longest window. dropout: 0.1 in the paper.
    """

    def __init__(
        self,
        vocab_size: int,
        layers: int = 12,
        heads: int = 12,
        width: int = 768,
        context: int = 512,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_sizes(dropout, layers=layers, heads=heads, width=width, context=context)
        self.vocab_size, self.context = vocab_size, context
        self.tokens = nn.Embedding(vocab_size, width)
        self.positions = nn.Embedding(context, width)
        self.segments = nn.Embedding(2, width)
        self.norm = nn.LayerNorm(width, BERT.epsilon)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(width, heads, dropout, BERT) for _ in range(layers))
        self.head = nn.Linear(width, width)
        self.head_norm = nn.LayerNorm(width, BERT.epsilon)
        self.bias = nn.Parameter(torch.zeros(vocab_size))
        # Truncated at two standard deviations, as in the paper's code.
        initialise(self, partial(nn.init.trunc_normal_, std=_STD, a=-2 * _STD, b=2 * _STD))

    def forward(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """(n, length) int64 tokens and (n, k) int64 positions in them -> logits at these, (n, k, vocabulary).

        The head costs as much as several blocks, and only the masked positions need it.
        """
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]] + self.segments.weight[0]
        x = self.dropout(self.norm(x))
        for block in self.blocks:
            x = block(x)
        x = torch.take_along_dim(x, positions[:, :, None], dim=1)
        x = self.head_norm(functional.gelu(self.head(x)))
        return functional.linear(x, self.tokens.weight, self.bias)
