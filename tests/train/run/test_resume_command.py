"""A stopped run says how it goes on: with the words that started it."""

import shlex

import pytest

from hpc_train.train.run.resume_command import resume_command


@pytest.mark.parametrize(
    ("words", "launcher", "command"),
    [
        ("hpc-train train a.toml", "mpirun", "mpirun -n 4 hpc-train train a.toml --resume auto"),
        ("hpc-train train --resume auto a.toml", None, "hpc-train train a.toml --resume auto"),
        ("/x/__main__.py train a.toml --resume=runs/a/b", "srun", "srun -n 4 hpc-train train a.toml --resume auto"),
        (
            "hpc-train train 'my job.toml' --set train.steps=3 --resume runs/a",
            None,
            "hpc-train train 'my job.toml' --set train.steps=3 --resume auto",
        ),
        ("own.py 3", "mpirun", ""),
    ],
)
def test_the_command_is_the_one_that_started_the_run(words: str, launcher: str | None, command: str) -> None:
    assert resume_command(shlex.split(words), launcher, 4) == command  # type: ignore[arg-type]
