"""The names of transformers' `GPT2LMHeadModel` for the tensors of `Gpt`, and which of them it stores transposed.

Read from transformers 5 (`modeling_gpt2.py`): its `Conv1D` holds (inputs, outputs) where `nn.Linear` holds (outputs,
inputs). Queries, keys and values, and the heads in each, are in the same order in both.
"""

import re

_PREFIX = "transformer."  # files made of the body alone, such as OpenAI's own, lack it
_BLOCK_PARTS = {
    "attention_norm": "ln_1",
    "attention.inputs": "attn.c_attn",
    "attention.output": "attn.c_proj",
    "narrow_norm": "ln_2",
    "wide": "mlp.c_fc",
    "narrow": "mlp.c_proj",
}
_OTHERS = {"tokens": "wte", "positions": "wpe", "norm": "ln_f"}
_OUR_BLOCK_PARTS = {theirs: ours for ours, theirs in _BLOCK_PARTS.items()}
_OUR_OTHERS = {theirs: ours for ours, theirs in _OTHERS.items()}

EMBEDDING, HEAD = f"{_PREFIX}wte.weight", "lm_head.weight"  # the head's weights are the embedding's


def to_gpt2(ours: str) -> str:
    """ "blocks.0.wide.weight" -> "transformer.h.0.mlp.c_fc.weight". Raises KeyError for what a `Gpt` has not."""
    if block := re.fullmatch(r"blocks\.(\d+)\.(.+)\.(weight|bias)", ours):
        return f"{_PREFIX}h.{block[1]}.{_BLOCK_PARTS[block[2]]}.{block[3]}"
    module, _, kind = ours.rpartition(".")
    return f"{_PREFIX}{_OTHERS[module]}.{kind}"


def from_gpt2(theirs: str) -> str | None:
    """The inverse of `to_gpt2`; None for a name that is none of theirs."""
    body = theirs.removeprefix(_PREFIX)
    if block := re.fullmatch(r"h\.(\d+)\.(.+)\.(weight|bias)", body):
        part = _OUR_BLOCK_PARTS.get(block[2])
        return part and f"blocks.{block[1]}.{part}.{block[3]}"
    module, _, kind = body.rpartition(".")
    return f"{_OUR_OTHERS[module]}.{kind}" if module in _OUR_OTHERS else None


def is_transposed(ours: str) -> bool:
    """Whether transformers stores the transpose of this tensor."""
    part = re.fullmatch(r"blocks\.\d+\.(.+)\.weight", ours)
    return part is not None and not part[1].endswith("_norm")


def is_gpt2(names: object) -> bool:
    """Whether a file with these names holds a GPT-2 of transformers."""
    return isinstance(names, dict) and any(name in names for name in (EMBEDDING, EMBEDDING.removeprefix(_PREFIX)))


def is_constant(theirs: str) -> bool:
    """Whether it is a causal mask, which older versions stored with the weights."""
    return re.fullmatch(r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)", theirs) is not None
