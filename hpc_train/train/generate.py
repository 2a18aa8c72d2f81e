"""Text out of a trained model: the newest good checkpoint of a run goes on where a prompt ends."""

import sys
from pathlib import Path
from typing import cast

import torch

from hpc_train.core import rundir
from hpc_train.core.config import load
from hpc_train.core.errors import UserError
from hpc_train.core.world import World
from hpc_train.train.comm.context import Context
from hpc_train.train.data.files import open_files
from hpc_train.train.data.tokenizer import Tokenizer
from hpc_train.train.models.gpt import Gpt
from hpc_train.train.run.checkpoint.restore import read_newest
from hpc_train.train.tasks.language import Language


def generate(
    path: Path,
    overrides: tuple[str, ...],
    prompt: str,
    num_tokens: int,
    temperature: float,
    top_k: int | None,
    seed: int,
) -> str:
    """`prompt` and what the newest run at or below `path` writes after it: `num_tokens` tokens, fewer where it ends.

    overrides: of the run's configuration, such as data.file=... where the data, which hold the tokenizer, have moved.
    Without MPI. Raises `UserError`.
    """
    run = max(rundir.find([path]), key=lambda run: run.path.name)
    config = load(run.config, overrides).config
    if config.task.kind != "language":
        raise UserError(
            f"{run.path} is a run of task.kind = '{config.task.kind}', which writes no text",
            "Name a run of task.kind = 'language', such as those of configs/gpt-text.toml.",
        )
    facts = open_files(config, Context(World()), "python-source").tokenizer_attributes
    if "tokenizer" not in facts:
        raise UserError(
            f"data.file = '{config.data.file}' does not say what its tokens mean",
            "Text comes of data that hpc-train prepare text has made.",
        )
    tokenizer = Tokenizer(str(facts["tokenizer"]), int(facts["vocab_size"]), facts.get("json", ""))
    model = cast(Gpt, Language(config, Context(World())).model())
    state, stated = read_newest(run, model, _say)
    if not state:
        raise UserError(f"{run.path} has no checkpoint", "It was not saved: train again, with checkpoint.keep = 1.")
    model.load_state_dict(state["model"])
    _say(f"Step {stated['step']} of {run.path}")
    tokens = [tokenizer.end_of_text, *map(int, tokenizer.encode("--prompt", prompt.encode(errors="surrogateescape")))]
    torch.manual_seed(seed)
    return tokenizer.decode(_sampled(model.eval(), tokens, num_tokens, temperature, top_k, tokenizer.end_of_text)[1:])


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)  # the text alone goes to where it may be piped


@torch.no_grad()
def _sampled(
    model: Gpt, tokens: list[int], num_tokens: int, temperature: float, top_k: int | None, end_of_text: int
) -> list[int]:
    """`tokens` and those drawn after them, one by one. temperature 0: always the likeliest."""
    for _ in range(num_tokens):
        seen = torch.tensor([tokens[-model.context :]])
        logits = model.logits(model.features(seen)[0, -1])[: model.vocab_size].float()  # of one place, not of all
        if top_k is not None and top_k < len(logits):
            logits[logits < logits.topk(top_k).values[-1]] = float("-inf")
        if temperature == 0:
            drawn = int(logits.argmax())
        else:
            drawn = int(torch.multinomial(torch.softmax(logits / temperature, 0), 1))
        if drawn == end_of_text:
            break
        tokens.append(drawn)
    return tokens
