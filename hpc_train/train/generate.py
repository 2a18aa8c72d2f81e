"""Generates text: a language model's newest good checkpoint continues a prompt."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hpc_train.core import rundir
from hpc_train.core.config import load
from hpc_train.core.errors import UserError
from hpc_train.core.world import World
from hpc_train.train.comm.context import Context
from hpc_train.train.data.files import open_files
from hpc_train.train.data.tokenizer import Tokenizer
from hpc_train.train.models.gpt import Gpt
from hpc_train.train.run.checkpoint.restore import Plan, Replicated, check_fits, load_newest, plan_model
from hpc_train.train.tasks.language import Language, Text


@dataclass(frozen=True)
class Decoding:
    """How tokens are drawn. temperature 0: always the most likely token. top_k: from as many of the most likely."""

    num_tokens: int
    temperature: float
    top_k: int | None
    seed: int


def generate(path: Path, overrides: tuple[str, ...], prompt: str, decoding: Decoding) -> str:
    """`prompt` and up to `num_tokens` tokens that the newest run at or below `path` generates after it.

    overrides: of the run's configuration, such as data.file=... if the data, which hold the tokenizer, have moved.
    Needs no MPI. Raises `UserError`.
    """
    run = max(rundir.find([path]), key=lambda run: run.path.name)
    config = load(run.config, overrides).config
    if config.task.kind != "language":
        raise UserError(
            f"{run.path} is a run of task.kind = '{config.task.kind}', which generates no text",
            "Name a run of task.kind = 'language', such as one of configs/gpt-text.toml.",
        )
    facts = open_files(config, Context(World())).tokenizer_attributes
    if "tokenizer" not in facts:
        raise UserError(
            f"data.file = '{config.data.file}' has no tokenizer",
            "Only a model of data made by hpc-train prepare text can generate text.",
        )
    tokenizer = Tokenizer(str(facts["tokenizer"]), int(facts["vocab_size"]), facts.get("json", ""))
    task = Language(config, Context(World()))
    model = task.model()
    alone = Context(World())

    def plan(state: dict[str, Any]) -> Plan:
        wanted, finish = plan_model(model, state["model"])
        return Plan([Replicated(alone, wanted)], finish)

    stated = load_newest(run, alone, lambda state, _: check_fits(state, model), plan, _say)
    if not stated:
        raise UserError(f"{run.path} has no checkpoint", "It was not saved: train again, with checkpoint.keep = 1.")
    _say(f"Step {stated['step']} of {run.path}")
    tokens = [tokenizer.end_of_text, *map(int, tokenizer.encode("--prompt", prompt.encode(errors="surrogateescape")))]
    return tokenizer.decode(_sample(model.eval(), task.text, tokens, decoding, tokenizer.end_of_text)[1:])


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)  # stdout may be piped: it gets the text alone


@torch.no_grad()
def _sample(model: nn.Module, text: Text, tokens: list[int], decoding: Decoding, end_of_text: int) -> list[int]:
    """`tokens` and those drawn after them, up to the end of the text."""
    torch.manual_seed(decoding.seed)
    for _ in range(decoding.num_tokens):
        seen = torch.tensor([tokens[-text.train.length :]])
        # Of the last position alone, where a model has a way to ask for it.
        last = model.logits(model.features(seen)[0, -1]) if isinstance(model, Gpt) else model(seen)[0, -1]
        logits = last[: text.vocab_size].float()
        if decoding.top_k is not None and decoding.top_k < len(logits):
            logits[logits < logits.topk(decoding.top_k).values[-1]] = float("-inf")
        if decoding.temperature == 0:
            drawn = int(logits.argmax())
        else:
            drawn = int(torch.multinomial(torch.softmax(logits / decoding.temperature, 0), 1))
        if drawn == end_of_text:
            break
        tokens.append(drawn)
    return tokens
