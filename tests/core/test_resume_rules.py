"""What may change between a run and its continuation."""

from pathlib import Path
from typing import Any

import pytest

from hpc_train.core import resume_rules
from hpc_train.core.config import flatten
from hpc_train.core.errors import UserError
from hpc_train.core.resume_rules import Rule
from hpc_train.core.settings import Config

RUN = Path("runs/job/20260101T000000Z-np2")


def job(**sections: Any) -> Config:
    train = {"steps": 24, "global_batch": 8, **sections.pop("train", {})}
    return Config.model_validate({"name": "job", "data": {"file": "/a/x.h5"}, **sections, "train": train})


def test_every_key_of_a_job_file_has_a_rule() -> None:
    one = job()
    for key in flatten(one.model_dump()):
        assert resume_rules._rule(key, one, one) in Rule, key
    assert {rule for rule in resume_rules._RULES.values()} == set(Rule)
    unused = [
        each for each in resume_rules._RULES if not any(key.startswith(each) for key in flatten(one.model_dump()))
    ]
    assert not unused, "a rule for a key that is no more"


@pytest.mark.parametrize(
    ("before", "now", "words"),
    [
        ({}, {"seed": 1}, ["seed = 1 here, 0 in the run", "Set seed back to 0", "--resume never"]),
        ({}, {"train": {"optimizer": "adamw"}}, ["train.optimizer = 'adamw'"]),
        ({}, {"task": {"options": {"hidden": [3]}}}, ["task.options"]),
        (
            {"train": {"schedule": "cosine"}},
            {"train": {"schedule": "cosine", "steps": 48}},
            [
                "train.steps = 48 here, 24 in the run",
                "schedule = 'cosine' ends at train.steps",
                "train.schedule=constant",
            ],
        ),
    ],
)
def test_what_would_make_another_training_of_the_steps_taken_is_refused(
    before: dict[str, Any], now: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(UserError) as refused:
        resume_rules.check(job(**before), job(**now), RUN)
    assert all(each in str(refused.value) for each in [str(RUN), *words]), refused.value


def test_what_goes_on_differently_is_said_and_what_no_step_depends_on_is_not() -> None:
    now = job(
        data={"file": "/b/x.h5"},
        train={"steps": 48, "lr": 0.5, "threads": 3, "log_every": 1},
        run={"root": "elsewhere"},
        checkpoint={"keep": 5},
    )
    lines = [str(change) for change in resume_rules.said(resume_rules.check(job(), now, RUN))]
    assert lines == [
        "train.lr = 0.5 here, 0.1 in the run: updates from now on use the new value",
        "train.steps = 48 here, 24 in the run: updates from now on use the new value",
        "train.threads = 3 here, 0 in the run: steps may take a different time from now on, and sums be "
        "rounded differently; a report mixes them",
    ]
    assert not resume_rules.same_job(job(), now)
    assert resume_rules.same_job(
        job(), job(data={"file": "/b/x.h5"}, run={"root": "elsewhere"}, checkpoint={"keep": 5})
    )
    assert not resume_rules.same_job(job(), job(data={"file": "/a/y.h5"}))


def test_a_schedule_that_is_named_anew_may_end_elsewhere() -> None:
    changes = resume_rules.check(job(train={"schedule": "cosine"}), job(train={"steps": 48, "lr": 0.01}), RUN)
    assert [change.key for change in resume_rules.said(changes)] == ["train.lr", "train.schedule", "train.steps"]
