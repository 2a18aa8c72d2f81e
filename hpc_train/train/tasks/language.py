"""Language models: predict the next token, or masked tokens, on token streams from HDF5."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from hpc_train.core.errors import UserError
from hpc_train.core.sampling import Order, row_noise
from hpc_train.core.settings import Config
from hpc_train.core.world import World
from hpc_train.train import models
from hpc_train.train.comm.context import Context
from hpc_train.train.data.dataset import USES, Use, open_order, value_range
from hpc_train.train.data.files import Files, describe, open_files
from hpc_train.train.data.other_samples import test_files, validation_files
from hpc_train.train.data.rank_batches import RankBatches
from hpc_train.train.data.tokens import StreamName, Tokens, open_tokens
from hpc_train.train.data.unwritten import require_written
from hpc_train.train.tasks.baselines import count_bigrams, count_tokens

_MASKED_SHARE = 0.15  # of a window's tokens, as in the BERT paper
_TEST_STEP = -1  # of the masks in a test: no training step has this number
_TEST_WINDOWS = 64
_MAX_TEST_LOGITS = 1 << 27  # at once, for large vocabularies


@dataclass(frozen=True)
class Text:
    """The token streams of a job's data as windows, and the model for them."""

    train: Tokens
    validation: Tokens | None
    test: Tokens | None
    vocab_size: int  # of the data, without a mask
    model: Callable[[], nn.Module]
    order: Order  # of the windows
    reading: str
    at_most: int | None = None  # of the windows to test on

    def batches(
        self, tokens: Tokens, world: World, read: Callable[[np.ndarray], Any], at_most: int | None = None
    ) -> Iterator[Any]:
        """What `read` makes of this rank's share of windows to measure on, some at a time. at_most: of all of them."""
        num_windows = max(1, min(_TEST_WINDOWS, _MAX_TEST_LOGITS // (tokens.length * self.vocab_size)))
        return RankBatches(len(tokens), world, num_windows, read, at_most)


def open_text(config: Config, context: Context, masked: bool) -> Text:
    """Collective. Opens and checks the data; `masked`: the model's vocabulary has one more token, the mask.

    Raises `UserError` if file, options and tokens do not fit together.
    """
    task, options = config.task, _model_options(config)
    stated = task.options.get("vocab_size")
    files = context.on_all(lambda: open_files(config, context))
    vocab_size = context.on_all(lambda: _vocab_size(config, files, stated, masked))
    length = context.on_all(lambda: _window_length(config, masked))
    streams = context.on_all(lambda: _open_streams(config, files, length, masked, context))
    context.on_root(lambda: _require_written(streams))
    for stream in streams:
        _check_range(stream, vocab_size, context)
    of = {stream.use: stream.tokens for stream in streams}
    train = of["train"]
    make_model = partial(models.language_model, task.model, vocab_size + masked, length, options, masked)
    order = open_order([train.values], len(train), config, train.length)
    reading = describe(files, str(config.data.inputs), train.values)
    at_most = config.test.samples
    return Text(train, of.get("validation"), of.get("test"), vocab_size, make_model, order, reading, at_most)


def _model_options(config: Config) -> dict[str, Any]:
    """Without the size of the vocabulary, which is the data's."""
    return {name: value for name, value in config.task.options.items() if name != "vocab_size"}


def _window_length(config: Config, masked: bool) -> int:
    """The context of the model."""
    length = models.context_length(config.task.model, _model_options(config), masked)
    if length is None:
        raise UserError(
            f"task.model = '{config.task.model}' does not say how many tokens it takes at once",
            "Set task.options.context, a parameter of the model.",
        )
    if not isinstance(length, int) or length < 1:
        raise UserError(f"task.options.context = {length}", "It is a positive integer.")
    return length


class _Stream(NamedTuple):
    """The windows of one use, of data set `name`."""

    use: Use
    files: Files
    name: str
    tokens: Tokens


def _open_streams(config: Config, files: Files, length: int, masked: bool, context: Context) -> list[_Stream]:
    """The windows to train on, and to validate and to test on if there are some."""
    data = config.data
    if data.read != "auto":
        raise UserError(
            f"data.read = '{data.read}' does not go with task.kind = '{config.task.kind}'",
            "Tokens are read through a memory map or by chunks: remove data.read.",
        )
    num_ahead = 0 if masked else 1
    found = []
    sources = (validation_files(config, files, context), test_files(config, files, context))
    for use, where in zip(USES, (files, *sources), strict=True):
        if where is not None:
            prefix = "" if use == "train" else f"{use}_"
            key = f"data.{prefix}inputs"
            name = _one(getattr(data, f"{prefix}inputs"), key)
            named = StreamName(name, key, getattr(data, f"{prefix}offsets"))
            found.append(_Stream(use, where, name, open_tokens(where, named, length, num_ahead)))
    return found


def _require_written(streams: list[_Stream]) -> None:
    for stream in streams:
        for path, dataset in zip(stream.files.paths, stream.files.datasets(stream.name, "data"), strict=True):
            require_written(path, dataset)


def _one(names: str | list[str], key: str) -> str:
    if isinstance(names, str):
        return names
    raise UserError(f"{key} = {names}: language models read one stream of tokens", "Name one data set.")


def _vocab_size(config: Config, files: Files, stated: Any, masked: bool) -> int:
    """How many different tokens the data have, by the file's attributes or by task.options.vocab_size."""
    found, file = files.tokenizer_attributes.get("vocab_size"), config.data.file
    if stated is not None and (not isinstance(stated, int) or stated < 1):
        raise UserError(f"task.options.vocab_size = {stated}", "It is a positive integer.")
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
            f"Set it to {size} or remove it, or prepare the text again: --tokenizer bpe:{stated - masked}",
        )
    return size - masked


def _check_range(stream: _Stream, vocab_size: int, context: Context) -> None:
    """Collective. Raises `UserError` for tokens outside the vocabulary."""
    limits = np.iinfo(stream.tokens.values.dtype)
    if limits.min == 0 and limits.max < vocab_size:
        return  # the type cannot hold a token outside, such as bytes: no need to read them all
    low, high = value_range(stream.tokens.values, context)

    def check() -> None:
        if low < 0 or high >= vocab_size:
            wrong = low if low < 0 else high
            raise UserError(
                f"{stream.files.paths[0]}: token {wrong} in {stream.name} is out of range for a vocabulary of "
                f"{vocab_size}",
                "Tokens are 0 to vocab_size - 1: prepare the text again, or set task.options.vocab_size.",
            )

    context.on_all(check)


class TextTask:
    """What both language tasks have in common."""

    def __init__(self, text: Text) -> None:
        self.text = text
        self.num_samples, self.order, self.reading = len(text.train), text.order, text.reading

    def model(self) -> nn.Module:
        return self.text.model()

    def prefetch(self, rows: np.ndarray) -> None:
        self.text.train.prefetch(rows)


# ---------------------------------------------------------------------------------------------- the next token


@dataclass(frozen=True)
class Windows:
    """`tokens` (n, context + 1) of the file's type. bigram_loss: in a test, the sum of a bigram model's losses."""

    tokens: torch.Tensor
    bigram_loss: float | None = None


class Language(TextTask):
    """Trains on the mean loss of a window's next tokens, in nats."""

    def __init__(self, config: Config, context: Context) -> None:
        """Collective. Opens the data and checks it."""
        super().__init__(open_text(config, context, masked=False))
        self.context = context

    def batch(self, rows: np.ndarray, step: int) -> Windows:
        return Windows(torch.from_numpy(self.text.train.windows(rows)))

    def loss(self, model: nn.Module, batch: Windows) -> torch.Tensor:
        return self._sum(model, batch) / self.text.train.length

    def test_batches(self, world: World) -> Iterator[Windows]:
        """Collective: all ranks count the bigrams of the training tokens."""
        test, text = self.text.test, self.text
        if test is None:
            return iter(())
        tested = test.values[: len(test.values)]  # all of it: windows within documents begin anywhere
        bigrams = count_bigrams(text.train.values, tested, text.vocab_size, self.context)

        def read(rows: np.ndarray) -> Windows:
            windows = test.windows(rows)
            return Windows(torch.from_numpy(windows), bigrams.loss(windows))

        return text.batches(test, world, read, text.at_most)

    def validation_batches(self, world: World) -> Iterator[Windows]:
        tokens = self.text.validation
        if tokens is None:
            return iter(())
        return self.text.batches(tokens, world, lambda rows: Windows(torch.from_numpy(tokens.windows(rows))))

    def test(self, model: nn.Module, batch: Windows) -> tuple[int, dict[str, float]]:
        num_tokens = batch.tokens[:, 1:].numel()
        measures = {"loss": self._sum(model, batch).item()}
        return num_tokens, measures if batch.bigram_loss is None else measures | {"bigram_loss": batch.bigram_loss}

    def _sum(self, model: nn.Module, batch: Windows) -> torch.Tensor:
        tokens = batch.tokens.long()
        logits = model(tokens[:, :-1])
        return functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")


# ---------------------------------------------------------------------------------------------- masked tokens


@dataclass(frozen=True)
class MaskedWindows:
    """`tokens` (n, context) with masks; `positions` (n, k) of the masked tokens, and `targets` (n, k), those tokens.

    num_unigram: how many of the targets are the most frequent token of the training text, in a test.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    targets: torch.Tensor
    num_unigram: int | None = None


class MaskedLanguage(TextTask):
    """Trains on the mean loss of a window's masked tokens, in nats.

    15% of a window's tokens are predicted: 80% of them are masked, 10% replaced by a random token, 10% left as they are
    (Devlin et al., 2018). Which ones, and by what, depends on the seed, the step and the window alone.
    """

    def __init__(self, config: Config, context: Context) -> None:
        """Collective. Opens the data and checks it."""
        super().__init__(open_text(config, context, masked=True))
        self.seed, self.context = config.seed, context
        self.num_masked = max(1, round(_MASKED_SHARE * self.text.train.length))

    def batch(self, rows: np.ndarray, step: int) -> MaskedWindows:
        return self._masked(self.text.train, rows, step)

    def loss(self, model: nn.Module, batch: MaskedWindows) -> torch.Tensor:
        logits, targets = self._logits(model, batch)
        return functional.cross_entropy(logits, targets, reduction="sum") / self.num_masked

    def test_batches(self, world: World) -> Iterator[MaskedWindows]:
        """Collective: all ranks count the training tokens."""
        test = self.text.test
        if test is None:
            return iter(())
        most_frequent = int(count_tokens(self.text.train.values, self.text.vocab_size, self.context).argmax())
        read = partial(self._masked, test, step=_TEST_STEP, most_frequent=most_frequent)
        return self.text.batches(test, world, read, self.text.at_most)

    def validation_batches(self, world: World) -> Iterator[MaskedWindows]:
        tokens = self.text.validation
        if tokens is None:
            return iter(())
        return self.text.batches(tokens, world, partial(self._masked, tokens, step=_TEST_STEP))

    def test(self, model: nn.Module, batch: MaskedWindows) -> tuple[int, dict[str, float]]:
        logits, targets = self._logits(model, batch)
        loss = functional.cross_entropy(logits, targets, reduction="sum")
        num_correct = (logits.argmax(1) == targets).sum().item()
        measures = {"loss": loss.item(), "accuracy": num_correct}
        counted = {} if batch.num_unigram is None else {"unigram_accuracy": batch.num_unigram}
        return len(targets), measures | counted

    def _masked(self, source: Tokens, rows: np.ndarray, step: int, most_frequent: int | None = None) -> MaskedWindows:
        windows, mask = source.windows(rows), self.text.vocab_size
        noise = row_noise(self.seed, step, rows, source.length + self.num_masked)
        shuffled, chance = np.argsort(noise[:, : source.length]), noise[:, source.length :]
        positions = np.sort(shuffled[:, : self.num_masked])
        targets = np.take_along_axis(windows, positions, 1)
        random_tokens = (chance // np.uint64(10)) % np.uint64(mask)
        shown = np.select([chance % 10 < 8, chance % 10 == 8], [np.uint64(mask), random_tokens], targets)
        tokens = windows.astype(np.promote_types(windows.dtype, np.min_scalar_type(mask)))
        np.put_along_axis(tokens, positions, shown.astype(tokens.dtype), 1)
        return MaskedWindows(
            torch.from_numpy(tokens),
            torch.from_numpy(positions.astype(np.int32)),
            torch.from_numpy(targets),
            None if most_frequent is None else int((targets == most_frequent).sum()),
        )

    def _logits(self, model: nn.Module, batch: MaskedWindows) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits (n * k, vocabulary) and targets (n * k)."""
        return model(batch.tokens.long(), batch.positions.long()).flatten(0, 1), batch.targets.long().flatten()
