from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.harness import Job

Reference = Callable[..., Job]


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Reference:
    """reference(ranks, words...): an undisturbed run, made once for all tests that compare with it."""
    known: dict[tuple[object, ...], Job] = {}

    def run(ranks: int, *words: str, **env: str) -> Job:
        key = (ranks, words, tuple(env.items()))
        if key not in known:
            known[key] = Job(ranks, tmp_path_factory.mktemp("reference"), digits, *words, **env)
            ended = known[key].end()
            assert ended.code == 0, ended
        return known[key]

    return run
