"""A section of a report that cannot be made says why in its place; all others are made."""

import os
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from hpc_train.core.errors import UserError
from hpc_train.core.formatting import plain

RAISE = "HPC_TRAIN_RAISE"  # in the environment, not empty: the first fault is raised with its traceback
_LONGEST = 200  # letters of an error's own message

P = ParamSpec("P")
T = TypeVar("T")


class SectionGuard:
    """Makes the sections of one report and collects the failures.

    Tests run with `RAISE` set, so that no bug hides behind a sentence.
    """

    def __init__(self) -> None:
        self.faults: list[str] = []  # one sentence each, without duplicates

    def call(self, what: str, fallback: Callable[[str], T], make: Callable[P, T], *args: P.args, **more: P.kwargs) -> T:
        """What `make` returns, or if it fails what `fallback` makes of a sentence that says why. what: "the plan"."""
        try:
            return make(*args, **more)
        except Exception as error:
            if os.environ.get(RAISE):
                raise
            sentence = _sentence(what, error)
        if sentence not in self.faults:
            self.faults.append(sentence)
        return fallback(sentence)


def _sentence(what: str, error: Exception) -> str:
    if isinstance(error, UserError):
        return plain(f"Not made: {what}: {error.what}")
    words = plain(" ".join(str(error).split())[:_LONGEST])
    kind = type(error).__name__ + (f": {words}" if words else "")
    return f"Not made: {what}, because of a bug in hpc-train ({kind}). {RAISE}=1 in the environment shows the traceback"
