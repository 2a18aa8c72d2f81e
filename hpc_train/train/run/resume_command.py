"""The command that continues a stopped run."""

import shlex
from collections.abc import Iterator, Sequence
from typing import Literal

from hpc_train.core import redaction


def resume_command(words: Sequence[str], launcher: Literal["mpirun", "srun"] | None, num_ranks: int) -> str:
    """ "mpirun -n 2 hpc-train train job.toml --resume auto"; "" if the words are not those of hpc-train train.

    words: as in sys.argv. Further options of the launcher are not known.
    """
    if list(words[1:2]) != ["train"]:
        return ""
    launch = {"mpirun": ["mpirun", "-n", str(num_ranks)], "srun": ["srun", "-n", str(num_ranks)], None: []}[launcher]
    return shlex.join([*launch, "hpc-train", *redaction.command([*_without_resume(words[1:]), "--resume", "auto"])])


def _without_resume(words: Sequence[str]) -> Iterator[str]:
    follows = False
    for word in words:
        if not follows and word != "--resume" and not word.startswith("--resume="):
            yield word
        follows = word == "--resume" and not follows
