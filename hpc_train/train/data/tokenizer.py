"""From text to tokens and back: bytes, or byte pairs that the `tokenizers` library learns from the text."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from typing import Any

import numpy as np

from hpc_train.core.errors import UserError

_END_OF_TEXT = "<|endoftext|>"
_NUM_BYTES = 256
_MAX_TOKENS = 1 << 24


@dataclass(frozen=True)
class Tokenizer:
    """`name` is "bytes" or "bpe:N"; for the latter, the library restores it from `json`.

    Both accept any text: byte pairs include all 256 bytes. Token 0 ends a document: no text contains that byte.
    """

    name: str
    vocab_size: int
    json: str = ""
    end_of_text: int = 0

    @property
    def dtype(self) -> np.dtype:
        """The smallest type that holds the tokens."""
        return np.min_scalar_type(self.vocab_size - 1)

    def count(self, where: object, data: bytes) -> int:
        """How many tokens `data` has."""
        return len(self.encode(where, data)) if self.json else len(data)

    def encode(self, where: object, data: bytes) -> np.ndarray:
        """The tokens of a text, as `dtype`. Raises `UserError`, which names `where` the text is from."""
        if not self.json:
            return np.frombuffer(data, np.uint8)
        return np.array(self._library.encode(decode_utf8(where, data)).ids, dtype=self.dtype)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens; bytes that are not UTF-8 become replacement characters."""
        text = bytes(ids).decode(errors="replace") if not self.json else self._library.decode(list(ids))
        return str(text)

    @cached_property
    def _library(self) -> Any:
        made = _tokenizers().Tokenizer.from_str(self.json)
        made.encode_special_tokens = True  # <|endoftext|> in a document is text, not its end
        return made


def vocab_size_of(name: str) -> int:
    """The vocabulary size of "bytes" or "bpe:N". Raises `UserError` for other names."""
    kind, _, size = name.partition(":")
    if name == "bytes":
        return _NUM_BYTES
    if kind == "bpe" and size.isascii() and size.isdecimal() and _NUM_BYTES < int(size) <= _MAX_TOKENS:
        return int(size)
    raise UserError(
        f"--tokenizer {name} is unknown",
        f"Known: bytes, and bpe:N with N from {_NUM_BYTES + 1} to {_MAX_TOKENS}, such as bpe:8192.",
    )


def train_tokenizer(name: str, texts: Iterable[str]) -> Tokenizer:
    """The tokenizer `name`; byte pairs are learned from `texts`. Raises `UserError`.

    Byte-pair encoding over bytes, as in GPT-2: Sennrich et al., 2016; Radford et al., 2019.
    """
    vocab_size = vocab_size_of(name)
    if name == "bytes":
        return Tokenizer(name, vocab_size)
    library = _tokenizers()
    made = library.Tokenizer(library.models.BPE())
    made.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[_END_OF_TEXT],
        initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(texts, trainer)
    if made.get_vocab_size() != vocab_size:
        raise UserError(
            f"--tokenizer {name}: so little text has only {made.get_vocab_size()} different tokens",
            f"Ask for fewer (bpe:{made.get_vocab_size()}), or use more text.",
        )
    return Tokenizer(name, vocab_size, made.to_str())


def decode_utf8(where: object, data: bytes) -> str:
    """`data` as text. Raises `UserError`, which names `where` it is from, if it is not UTF-8."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where} is not UTF-8: {error.reason} at byte {error.start}",
            "Convert it (iconv), or use --tokenizer bytes.",
        ) from None


def _tokenizers() -> Any:
    """The library, imported when it is needed: bytes need none."""
    try:
        return import_module("tokenizers")
    except ImportError as error:
        raise UserError(
            f"byte pairs need the tokenizers library, which cannot be loaded: {error}",
            "pip install tokenizers, or use --tokenizer bytes.",
        ) from None
