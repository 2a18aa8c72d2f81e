"""What of an unfinished file is on disk: one line for each piece, so that the same command goes on after a kill."""

import json
from pathlib import Path
from typing import IO, Any

from hpc_train.core import owned_files
from hpc_train.datasets.prepare.disk import no_room, write_all

Blocks = dict[str, dict[int, int]]  # name of a data set -> number of a block -> CRC-32 of its bytes


class Journal:
    """Lines of JSON: the work, then pieces that were written. On the root only.

    A piece counts once `commit` has written it. Where a file's own bookkeeping changes as it grows (chunks), it is
    torn from `flushing` to the next `commit`, and only then.
    """

    def __init__(self, path: Path, work: dict[str, Any], new: bool) -> None:
        self._path = path
        self._pending: list[dict[str, Any]] = []
        # Its checksums decide which bytes are kept: nobody else may write them.
        self._file: IO[bytes] = (
            owned_files.created(path, 0o644, 0) if new else owned_files.opened(path, "ab", buffering=0)
        )
        self._line(work if new else {})  # an empty line closes one that was cut short

    def add(self, name: str, first: int, checksums: list[int]) -> None:
        if checksums:
            self._pending.append({"name": name, "first": first, "crc32": checksums})

    def flushing(self) -> None:
        self._line({"flushing": True})

    def commit(self) -> None:
        for line in self._pending:
            self._line(line)
        self._pending.clear()
        self._line({"flushing": False})

    def _line(self, what: dict[str, Any]) -> None:
        try:  # to the system: that outlives the process; checksums tell what a crash of the node lost
            write_all(self._file, json.dumps(what).encode() + b"\n")
        except OSError as error:
            raise no_room(self._path, error.errno) from None

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()


def read(path: Path, work: dict[str, Any]) -> tuple[Blocks, str]:
    """(blocks on disk, why there are none): what is written of `work`, as the journal at `path` tells."""
    try:
        with owned_files.opened(path, "rb") as file:
            lines = file.read().decode().splitlines()
            others = owned_files.others_may_write(file)
    except (OSError, UnicodeDecodeError):
        return {}, "it has no journal"
    if others:
        return {}, "others may write its journal"
    told = []
    for line in lines:
        try:
            told.append(json.loads(line))
        except ValueError:
            continue  # the line that the kill cut short
    if not told or told[0] != json.loads(json.dumps(work)):
        return {}, "its source or its command is another"
    blocks: Blocks = {}
    torn = False
    for line in told[1:]:
        torn = line.get("flushing", torn)
        if "name" in line:
            blocks.setdefault(line["name"], {}).update(enumerate(line["crc32"], line["first"]))
    if torn:
        return {}, "it was stopped in the middle of a flush"
    return blocks, "" if blocks else "nothing was written yet"
