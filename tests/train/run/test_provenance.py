"""What meta.json says of the machine and the software."""

import subprocess
from pathlib import Path

import pytest

from hpc_train.train.run.provenance import git_state


def git(folder: Path, *words: str) -> None:
    who = ("-c", "user.name=a", "-c", "user.email=a@b")
    subprocess.run(["git", "-C", str(folder), *who, *words], check=True, capture_output=True)


def test_changes_of_a_tree_are_told_from_others_and_never_cost_the_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert git_state(tmp_path) == {}
    git(tmp_path, "init")
    (tmp_path / "a.py").write_bytes(b"1\n")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "a")
    clean = git_state(tmp_path)
    assert clean["dirty"] is False and len(clean["commit"]) == 40 and "changes" not in clean
    git(tmp_path, "config", "diff.external", "/bin/true")  # prints nothing, whatever has changed
    changed = []
    for content in (b"2\n", b"3\n", b"\xff\n"):
        (tmp_path / "a.py").write_bytes(content)
        changed.append(git_state(tmp_path))
    assert len({state["changes"] for state in changed}) == 3
    run = subprocess.run

    def slow(command: tuple[str, ...], **options: object) -> object:
        if "diff" in command:
            raise subprocess.TimeoutExpired(command, 10)
        return run(command, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(subprocess, "run", slow)
    assert git_state(tmp_path) == clean | {"dirty": True}
