"""The console that tables are printed on."""

import sys
from typing import Any

from rich.console import Console

from hpc_train.core.progress import on_terminal


def open_console(**options: Any) -> Console:
    """A rich console on stdout, with colours only if a person reads them; `options` are rich's."""
    # mpirun gives rank 0 a terminal even if its own output goes to a file, and rich would colour that file.
    is_of_launcher = sys.stdout.isatty() and not on_terminal()
    return Console(force_terminal=False if is_of_launcher else None, **options)
