"""Language: predicting the next token, and filling in masked ones, on token streams from HDF5."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from hpc_train.core.errors import UserError
from hpc_train.core.sampling import Order, rank_span, row_noise
from hpc_train.core.settings import Config
from hpc_train.core.world import World
from hpc_train.train import models
from hpc_train.train.comm.context import Context
from hpc_train.train.data.dataset import Tokens, open_order, open_tokens, value_range
from hpc_train.train.data.files import Files, describe, open_files
from hpc_train.train.tasks.baselines import count_bigrams, count_tokens

_MASKED = 0.15  # of a window's tokens, as in the BERT paper
_TEST_STEP = -1  # masks of the test are none of a step's
_TEST_WINDOWS = 64
_TEST_LOGITS = 1 << 27  # at most so many at once, for large vocabularies


@dataclass(frozen=True)
class Text:
    """The token streams of a file as windows, and what makes a model for them."""

    train: Tokens
    test: Tokens | None
    vocab_size: int  # of the file's tokens
    model: Callable[[], nn.Module]
    order: Order  # of the windows
    reading: str

    def test_rows(self, world: World) -> Iterator[np.ndarray]:
        """This rank's share of the test windows, some at a time."""
        assert self.test is not None
        at_once = max(1, min(_TEST_WINDOWS, _TEST_LOGITS // (self.test.length * self.vocab_size)))
        start, stop = rank_span(len(self.test), world.rank, world.size)
        for begin in range(start, stop, at_once):
            yield np.arange(begin, min(begin + at_once, stop))


def open_text(config: Config, context: Context, known: dict[str, Callable[..., nn.Module]], masked: bool) -> Text:
    """Collective. Opens and checks the data; `masked`: the model's vocabulary has one token more, the mask.

    Raises `UserError` where file, options and tokens do not fit together.
    """
    task, data, options = config.task, config.data, dict(config.task.options)
    stated = options.pop("vocab_size", None)
    files = context.on_all(lambda: open_files(config, context, "python-source"))
    vocab_size = context.on_all(lambda: _vocabulary(config, files, stated, masked))
    make = partial(models.make_model, known, task.model, (vocab_size + masked,), options)

    def open_both() -> tuple[Tokens, Tokens | None]:
        length = options.get("context", models.default(known, task.model, "context"))
        if not isinstance(length, int) or length < 1:
            raise UserError(f"task.options.context = {length}", "It is a positive whole number.")
        ahead = 0 if masked else 1
        train = open_tokens(files, names[0], "data.inputs", length, ahead, data.offsets)
        test = open_tokens(files, names[1], "data.test_inputs", length, ahead, data.test_offsets, optional=True)
        assert train is not None
        return train, test

    names = (_one(data.inputs, "data.inputs"), _one(data.test_inputs, "data.test_inputs"))
    train, test = context.on_all(open_both)
    for name, tokens in zip(names, (train, test), strict=True):
        if tokens is not None:
            _check_range(config, name, tokens, vocab_size, context)
    order = open_order([train.values], len(train), config, train.length)
    return Text(train, test, vocab_size, make, order, describe(files, names[0], train.values))


def _one(names: str | list[str], key: str) -> str:
    if isinstance(names, str):
        return names
    raise UserError(f"{key} = {names}: language models read one stream of tokens", "Name one data set.")


def _vocabulary(config: Config, files: Files, stated: Any, masked: bool) -> int:
    """How many different tokens the file has, by itself or by task.options.vocab_size."""
    found, file = files.tokenizer_attributes.get("vocab_size"), config.data.file
    if stated is not None and (not isinstance(stated, int) or stated < 1):
        raise UserError(f"task.options.vocab_size = {stated}", "It is a positive whole number.")
    if found is None and stated is None:
        raise UserError(
            f"data.file = '{file}' does not say how many different tokens it has",
            "Set task.options.vocab_size, or make it with hpc-train prepare text FILE --from DIR",
        )
    size = int(stated or 0) if found is None else int(found) + masked
    if stated not in (None, size):
        mask = " with the mask" * masked
        raise UserError(
            f"task.options.vocab_size = {stated}, and data.file = '{file}' has {size} different tokens{mask}",
            f"Set it to {size} or leave it out, or prepare the text again: --tokenizer bpe:{stated - masked}",
        )
    return size - masked


def _check_range(config: Config, name: str, tokens: Tokens, vocab_size: int, context: Context) -> None:
    """Collective. Raises `UserError` for tokens that the vocabulary does not have."""
    limits = np.iinfo(tokens.values.dtype)
    if limits.min == 0 and limits.max < vocab_size:
        return  # bytes need not be read through
    low, high = value_range(tokens.values, context)

    def check() -> None:
        if low < 0 or high >= vocab_size:
            wrong = low if low < 0 else high
            raise UserError(
                f"{config.data.file}: token {wrong} in {name} is out of range for a vocabulary of {vocab_size}",
                "Tokens are 0 to vocab_size - 1: prepare the text again, or set task.options.vocab_size.",
            )

    context.on_all(check)


# ---------------------------------------------------------------------------------------------- the next token


@dataclass(frozen=True)
class Windows:
    """`tokens` (n, context + 1) of the file's type. bigram_loss: the sum over them of a bigram model's losses."""

    tokens: torch.Tensor
    bigram_loss: float = 0.0


class Language:
    """Collective. Opens the data and checks it; trains on the mean loss of a window's next tokens, in nats."""

    def __init__(self, config: Config, context: Context) -> None:
        self.context = context
        self.text = open_text(config, context, models.CAUSAL, masked=False)
        self.num_samples, self.order, self.reading = len(self.text.train), self.text.order, self.text.reading

    def model(self) -> nn.Module:
        return self.text.model()

    def batch(self, rows: np.ndarray, step: int) -> Windows:
        return Windows(torch.from_numpy(self.text.train.windows(rows)))

    def prefetch(self, rows: np.ndarray) -> None:
        self.text.train.prefetch(rows)

    def loss(self, model: nn.Module, batch: Windows) -> torch.Tensor:
        return self._sum(model, batch) / self.text.train.length

    def test_batches(self, world: World) -> Iterator[Windows]:
        """Collective, at the first batch: all ranks count the bigrams of the training tokens."""
        text = self.text
        if text.test is None:
            return
        tested = text.test.values[: len(text.test.values)]  # windows within documents may begin anywhere in it
        bigrams = count_bigrams(text.train.values, tested, text.vocab_size, self.context)
        for rows in text.test_rows(world):
            windows = text.test.windows(rows)
            yield Windows(torch.from_numpy(windows), bigrams.loss(windows))

    def test(self, model: nn.Module, batch: Windows) -> tuple[int, dict[str, float]]:
        num_tokens = batch.tokens[:, 1:].numel()
        return num_tokens, {"loss": self._sum(model, batch).item(), "bigram_loss": batch.bigram_loss}

    def _sum(self, model: nn.Module, batch: Windows) -> torch.Tensor:
        tokens = batch.tokens.long()
        logits = model(tokens[:, :-1])
        return functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")


# ---------------------------------------------------------------------------------------------- masked tokens


@dataclass(frozen=True)
class MaskedWindows:
    """`tokens` (n, context) with masks; `places` (n, k) of what was masked, and `targets` (n, k) what stood there.

    num_unigram: how many of the targets are the training text's most frequent token.
    """

    tokens: torch.Tensor
    places: torch.Tensor
    targets: torch.Tensor
    num_unigram: int = 0


class MaskedLanguage:
    """Collective. Opens the data and checks it; trains on the mean loss of a window's masked tokens, in nats.

    15% of a window's tokens are to be guessed: 80% of them are masked, 10% replaced by any token, 10% left as they are
    (Devlin et al., 2018). Which, and by what, depends on the seed, the step and the window alone.
    """

    def __init__(self, config: Config, context: Context) -> None:
        self.seed, self.context = config.seed, context
        self.text = open_text(config, context, models.MASKED, masked=True)
        self.num_samples, self.order, self.reading = len(self.text.train), self.text.order, self.text.reading
        self.num_masked = max(1, round(_MASKED * self.text.train.length))

    def model(self) -> nn.Module:
        return self.text.model()

    def batch(self, rows: np.ndarray, step: int) -> MaskedWindows:
        return self._masked(self.text.train, rows, step)

    def prefetch(self, rows: np.ndarray) -> None:
        self.text.train.prefetch(rows)

    def loss(self, model: nn.Module, batch: MaskedWindows) -> torch.Tensor:
        logits, targets = self._logits(model, batch)
        return functional.cross_entropy(logits, targets, reduction="sum") / self.num_masked

    def test_batches(self, world: World) -> Iterator[MaskedWindows]:
        """Collective, at the first batch: all ranks count the training tokens."""
        if self.text.test is None:
            return
        commonest = int(count_tokens(self.text.train.values, self.text.vocab_size, self.context).argmax())
        for rows in self.text.test_rows(world):
            yield self._masked(self.text.test, rows, _TEST_STEP, commonest)

    def test(self, model: nn.Module, batch: MaskedWindows) -> tuple[int, dict[str, float]]:
        logits, targets = self._logits(model, batch)
        loss = functional.cross_entropy(logits, targets, reduction="sum")
        num_right = (logits.argmax(1) == targets).sum().item()
        return len(targets), {"loss": loss.item(), "accuracy": num_right, "unigram_accuracy": batch.num_unigram}

    def _masked(self, source: Tokens, rows: np.ndarray, step: int, commonest: int = -1) -> MaskedWindows:
        windows, mask = source.windows(rows), self.text.vocab_size
        noise = row_noise(self.seed, step, rows, source.length + self.num_masked)
        order, chance = np.argsort(noise[:, : source.length]), noise[:, source.length :]
        places = np.sort(order[:, : self.num_masked])
        targets = np.take_along_axis(windows, places, 1)
        random = (chance // np.uint64(10)) % np.uint64(mask)
        instead = np.select([chance % 10 < 8, chance % 10 == 8], [np.uint64(mask), random], targets)
        tokens = windows.astype(np.promote_types(windows.dtype, np.min_scalar_type(mask)))
        np.put_along_axis(tokens, places, instead.astype(tokens.dtype), 1)
        tensors = (torch.from_numpy(tokens), torch.from_numpy(places.astype(np.int32)), torch.from_numpy(targets))
        return MaskedWindows(*tensors, num_unigram=int((targets == commonest).sum()))

    def _logits(self, model: nn.Module, batch: MaskedWindows) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits (n * k, vocabulary) and what was to be guessed (n * k)."""
        return model(batch.tokens.long(), batch.places.long()).flatten(0, 1), batch.targets.long().flatten()
