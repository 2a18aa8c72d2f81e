"""What a further attempt at a run reads of the ones before."""

import json
from pathlib import Path
from typing import Any

import pytest

from hpc_train.core.errors import UserError
from hpc_train.core.rundir import RunDir
from hpc_train.train.run.meta_reader import read_meta

GOOD = {
    "size": 2,
    "started": "2026-01-01T00:00:00Z",
    "attempts": [{"attempt": 1, "first_step": 0, "continues": None}],
    "energy": {"assumption": None, "meters": {"n1": []}, "shared": {"n1": None}},
}


def test_what_was_written_is_read_and_an_older_one_too(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    assert read_meta(run) == {}
    for meta in (GOOD, {}, {"attempts": [{"first_step": 0}]}):
        run.meta.write_text(json.dumps(meta))
        assert read_meta(run) == meta


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"7", b"\xff", b"[" * 200_000, b'{"size": ' + b"9" * 5000 + b"}", None]
)
def test_a_damaged_meta_json_is_one_message(tmp_path: Path, content: bytes | None) -> None:
    run = RunDir(tmp_path)
    run.meta.mkdir() if content is None else run.meta.write_bytes(content)
    with pytest.raises(UserError, match=str(run.meta)) as refused:
        read_meta(run)
    assert "--resume never" in refused.value.remedy


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("size", "2"),
        ("started", 3),
        ("attempts", {}),
        ("attempts", [3]),
        ("attempts", [{"first_step": -1}]),
        ("attempts", [{"first_step": True}]),
        ("attempts", [{"first_step": 0, "continues": 7}]),
        ("energy", []),
        ("energy", {"shared": 3}),
    ],
)
def test_a_damaged_entry_is_named(tmp_path: Path, entry: str, value: Any) -> None:
    run = RunDir(tmp_path)
    run.meta.write_text(json.dumps({**GOOD, entry: value}))
    with pytest.raises(UserError, match=rf"meta.json: {entry}"):
        read_meta(run)
