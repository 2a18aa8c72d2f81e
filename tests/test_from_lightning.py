"""The page for those who come from Lightning: its jobs load, and its keys exist. `make models` trains them."""

import re

import pytest

from hpc_train.core.config import flatten, load
from hpc_train.core.settings import Config
from tests import jobs

PAGE = (jobs.ROOT / "docs/how-to/from-lightning.md").read_text()
NAMES = ("classification", "regression", "fine_tuning")


@pytest.mark.parametrize("name", NAMES)
def test_a_job_and_a_script_stand_side_by_side(name: str) -> None:
    config = load(jobs.ROOT / f"tests/lightning/{name}.toml").config
    script = (jobs.ROOT / f"tests/lightning/{name}.py").read_text()
    assert f"lightning/{name}.py" in PAGE and f"lightning/{name}.toml" in PAGE
    assert f"max_epochs={config.train.epochs:g}," in script and f"batch_size={config.train.global_batch}," in script


def test_the_keys_of_the_page_exist() -> None:
    sections = "|".join(Config.model_fields)
    named = set(re.findall(rf"`((?:{sections})\.[a-z_]+)(?: = [^`]*)?`", PAGE))
    known = set(flatten(load(jobs.ROOT / "tests/lightning/classification.toml").config.model_dump()))
    assert len(named) > 12 and named - known == {"validation.csv"}
