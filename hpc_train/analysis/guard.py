"""One section of a report that cannot be made costs no other one: it says why in its place."""

import os
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from hpc_train.core.errors import UserError
from hpc_train.core.formatting import plain

RAISE = "HPC_TRAIN_RAISE"  # in the environment, not empty: the first fault is raised with its traceback
_LONGEST = 200  # letters of an error's own words

P = ParamSpec("P")
T = TypeVar("T")


class SectionGuard:
    """Makes the sections of one report and remembers those that could not be made: a report with such is not whole.

    The tests run with `RAISE` set, so that no fault hides behind a sentence.
    """

    def __init__(self) -> None:
        self.faults: list[str] = []  # a sentence each, none twice

    def call(self, what: str, instead: Callable[[str], T], make: Callable[P, T], *args: P.args, **more: P.kwargs) -> T:
        """What `make` gives; where it fails what `instead` makes of the sentence that says so; what: "the plan"."""
        try:
            return make(*args, **more)
        except Exception as error:
            if os.environ.get(RAISE):
                raise
            told = _sentence(what, error)
        if told not in self.faults:
            self.faults.append(told)
        return instead(told)


def _sentence(what: str, error: Exception) -> str:
    if isinstance(error, UserError):
        return plain(f"Not made: {what}: {error.what}")
    words = plain(" ".join(str(error).split())[:_LONGEST])
    kind = type(error).__name__ + (f": {words}" if words else "")
    return f"Not made: {what}, because of a bug in hpc-train ({kind}). {RAISE}=1 in the environment shows the traceback"
