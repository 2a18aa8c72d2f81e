"""From text to tokens and back: bytes as they are, or byte pairs that the `tokenizers` library learns from the text."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from typing import Any

import numpy as np

from hpc_train.core.errors import UserError

_END_OF_TEXT = "<|endoftext|>"
_NUM_BYTES = 256
_MOST_TOKENS = 1 << 24


@dataclass(frozen=True)
class Tokenizer:
    """`name` is "bytes" or "bpe:N"; of the latter, `json` is what the library needs to make it again.

    Both take any text: byte pairs begin with all 256 bytes. Token 0 ends a document: as a byte it is in no text.
    """

    name: str
    vocab_size: int
    json: str = ""
    end_of_text: int = 0

    @property
    def dtype(self) -> np.dtype:
        """The smallest type of the tokens."""
        return np.min_scalar_type(self.vocab_size - 1)

    def count(self, where: object, data: bytes) -> int:
        """How many tokens `data` has; for bytes there is no need to look."""
        return len(self.encode(where, data)) if self.json else len(data)

    def encode(self, where: object, data: bytes) -> np.ndarray:
        """The tokens of a text, as `dtype`. Raises `UserError`, naming `where` it is from."""
        if not self.json:
            return np.frombuffer(data, np.uint8)
        return np.array(self._library.encode(decode_utf8(where, data)).ids, dtype=self.dtype)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens; bytes that are no UTF-8 become replacement characters."""
        text = bytes(ids).decode(errors="replace") if not self.json else self._library.decode(list(ids))
        return str(text)

    @cached_property
    def _library(self) -> Any:
        made = _tokenizers().Tokenizer.from_str(self.json)
        made.encode_special_tokens = True  # <|endoftext|> written in a document is text, and does not end it
        return made


def vocab_size_of(name: str) -> int:
    """How many different tokens "bytes" or "bpe:N" has. Raises `UserError` for other names."""
    kind, _, size = name.partition(":")
    if name == "bytes":
        return _NUM_BYTES
    if kind == "bpe" and size.isascii() and size.isdecimal() and _NUM_BYTES < int(size) <= _MOST_TOKENS:
        return int(size)
    raise UserError(
        f"--tokenizer {name} is not known",
        f"Known are: bytes, and bpe:N with N from {_NUM_BYTES + 1} to {_MOST_TOKENS}, such as bpe:8192.",
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
            f"--tokenizer {name}: so little text has {made.get_vocab_size()} different tokens and no more",
            f"Ask for fewer (bpe:{made.get_vocab_size()}), or bring more text.",
        )
    return Tokenizer(name, vocab_size, made.to_str())


def decode_utf8(where: object, data: bytes) -> str:
    """`data` as text. Raises `UserError`, naming `where` it is from, where it is no UTF-8."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where} is not UTF-8: {error.reason} at byte {error.start}",
            "Convert it (iconv), or use --tokenizer bytes.",
        ) from None


def _tokenizers() -> Any:
    """Loaded when it is used: bytes need no library."""
    try:
        return import_module("tokenizers")
    except ImportError as error:
        raise UserError(
            f"byte pairs need the tokenizers library, which cannot be loaded: {error}",
            "pip install tokenizers, or use --tokenizer bytes.",
        ) from None
