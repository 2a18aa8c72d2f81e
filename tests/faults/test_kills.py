"""Short chains of kills; `make test-kills` runs half an hour of them."""

from pathlib import Path

import pytest

from tests.faults import kills
from tests.faults.conftest import Reference


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "seed", [44, pytest.param(51, marks=pytest.mark.thorough), pytest.param(3, marks=pytest.mark.thorough)]
)
def test_a_chain_of_kills_ends_as_a_run_that_nobody_disturbed(
    seed: int, tmp_path: Path, digits: Path, reference: Reference
) -> None:
    ranks, _ = kills.kills(seed, 3)
    print(kills.play(seed, tmp_path / "chain", digits, reference(ranks), most=3))
