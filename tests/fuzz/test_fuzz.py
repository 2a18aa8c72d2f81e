"""Generated inputs; `make test` runs a sample, `make test-all` 5,000."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fuzz import materials
from tests.fuzz.kinds import KINDS, SHARES
from tests.fuzz.play import BATCH, Server, draw, play_all

SAMPLE, SAMPLE_OF_RUNS = 12, 6  # of each kind; a report takes a second


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server() as server:
        yield server


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory, server: Server) -> Path:
    folder = tmp_path_factory.mktemp("materials")
    materials.make(folder, server)
    return folder


def play(kind: str, seed: int, num_cases: int, server: Server, stock: Path, place: Path) -> None:
    cases = list(enumerate(draw(KINDS[kind], seed)))[:num_cases]
    failed = play_all(kind, cases, seed, server, stock, place)
    assert not failed, "\n\n".join(map(str, failed))


@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", KINDS)
def test_a_sample(kind: str, server: Server, stock: Path, tmp_path: Path) -> None:
    play(kind, 0, SAMPLE_OF_RUNS if kind == "run-directories" else SAMPLE, server, stock, tmp_path)


@pytest.mark.thorough
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("kind, seed", [(kind, seed) for kind in KINDS for seed in range(1, SHARES[kind] // BATCH + 1)])
def test_many(kind: str, seed: int, server: Server, stock: Path, tmp_path: Path) -> None:
    play(kind, seed, BATCH, server, stock, tmp_path)


def test_the_same_seed_draws_the_same_cases() -> None:
    for cases in KINDS.values():
        once, again = draw(cases, 3), draw(cases, 3)
        assert [what for what, _ in once] == [what for what, _ in again] and len(once) == BATCH
    assert sum(SHARES.values()) == 5000 and all(share % BATCH == 0 for share in SHARES.values())
