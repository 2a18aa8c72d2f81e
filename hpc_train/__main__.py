"""Where the program starts: `hpc-train` and `python -m hpc_train`."""

import signal


def main() -> None:
    """Loads the command line, then runs it.

    Loading takes half a second, more on a shared file system. Ctrl-C ends the process at once meanwhile: Python's own
    handler would raise in the middle of an import, and print a traceback.
    """
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    from hpc_train.cli.main import main as run

    signal.signal(signal.SIGINT, before)
    run()


if __name__ == "__main__":
    main()
