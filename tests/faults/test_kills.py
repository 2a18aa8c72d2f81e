"""Short chains of kills; `make test-kills` runs half an hour of them."""

from pathlib import Path

import pytest

from tests.faults import kills
from tests.faults.conftest import Reference


@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", [44, 51, 3])
@pytest.mark.thorough  # half a minute each; other files of this folder have one form of each of these kills
def test_a_chain_of_kills_ends_as_a_run_that_nobody_disturbed(
    seed: int, tmp_path: Path, digits: Path, reference: Reference
) -> None:
    ranks, _ = kills.kills(seed, 3)
    print(kills.play(seed, tmp_path / "chain", digits, reference(ranks), most=3))
