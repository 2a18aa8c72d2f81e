"""The one error type for mistakes a user can mend, and what other ranks raise for a fault of one of them."""


class UserError(Exception):
    """A mistake the user can mend: what is wrong (the key or file, its value) and the remedy.

    Only `cli.py` turns it into a message and exit code 2. `joint` says that every rank raises it, so that none
    need be aborted and one rank's message is enough.
    """

    joint = False

    def __init__(self, what: str, remedy: str) -> None:
        super().__init__(what, remedy)
        self.what = what
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.what}\n  {self.remedy}"


def not_written(path: object, error: OSError) -> UserError:
    """What to raise when the system refuses to write `path`: disk full, read-only, over quota."""
    return UserError(
        f"{path} could not be written: {error.strerror or error}",
        "Make room, or choose another place (run.root, --output).",
    )


class JointFailure(Exception):
    """Every rank raises it for a fault that some rank met; that rank's own exception carries the words."""
