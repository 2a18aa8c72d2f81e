"""The journal of an unfinished file: a line for each piece on disk, so that the same command resumes after a kill."""

import json
from pathlib import Path
from typing import IO, Any

from hpc_train.core import owned_files
from hpc_train.datasets.prepare.disk import cannot_write, write_all

Blocks = dict[str, dict[int, int]]  # name of a data set -> number of a block -> CRC-32 of its bytes


class Journal:
    """Lines of JSON: what is being written, then the pieces that were. On the root only.

    A piece counts once `commit` has written its line. While HDF5 writes the index of chunks, from `flushing` to the
    next `commit`, the file is torn.
    """

    def __init__(self, path: Path, header: dict[str, Any], new: bool) -> None:
        self._path = path
        self._pending: list[dict[str, Any]] = []
        # Its checksums decide which bytes are kept: nobody else may write them.
        self._file: IO[bytes] = (
            owned_files.created(path, 0o644, 0) if new else owned_files.opened(path, "ab", buffering=0)
        )
        self._write(header if new else {})  # an empty line ends one that a kill cut short

    def add(self, name: str, first: int, checksums: list[int]) -> None:
        if checksums:
            self._pending.append({"name": name, "first": first, "crc32": checksums})

    def flushing(self) -> None:
        self._write({"flushing": True})

    def commit(self) -> None:
        for line in self._pending:
            self._write(line)
        self._pending.clear()
        self._write({"flushing": False})

    def _write(self, line: dict[str, Any]) -> None:
        # To the system, which outlives this process. If the node crashes, checksums show what was lost.
        try:
            write_all(self._file, json.dumps(line).encode() + b"\n")
        except OSError as error:
            raise cannot_write(self._path, error.errno) from None

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()


def read(path: Path, header: dict[str, Any]) -> tuple[Blocks, str]:
    """(blocks on disk, why there are none), according to the journal at `path` of the work that `header` describes."""
    try:
        with owned_files.opened(path, "rb") as file:
            lines = file.read().decode().splitlines()
            if owned_files.others_may_write(file):
                return {}, "others may write its journal"
    except (OSError, UnicodeDecodeError):
        return {}, "it has no journal"
    entries = []
    for line in lines:
        try:
            entries.append(json.loads(line))
        except ValueError:
            continue  # cut short by the kill
    if not entries or entries[0] != json.loads(json.dumps(header)):
        return {}, "its source or its command is another"
    blocks: Blocks = {}
    is_torn = False
    for entry in entries[1:]:
        is_torn = entry.get("flushing", is_torn)
        if "name" in entry:
            blocks.setdefault(entry["name"], {}).update(enumerate(entry["crc32"], entry["first"]))
    if is_torn:
        return {}, "it was stopped in the middle of a flush"
    return blocks, "" if blocks else "nothing was written yet"
