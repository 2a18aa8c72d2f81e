"""These tests run on every rank at once: mpirun -n N python -m mpi4py -m pytest tests/parallel."""

import io
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from _pytest.config import create_terminal_writer

from hpc_train.core.job_environment import JobEnvironment
from hpc_train.train.comm.context import Context
from hpc_train.train.comm.startup import open_context

RANK = JobEnvironment.current().rank or 0


@pytest.hookimpl(trylast=True)  # after the terminal reporter is there
def pytest_configure(config: pytest.Config) -> None:
    if RANK:  # one rank's lines are enough, unless another fails
        config.stash[_OUTPUT] = io.StringIO()
        config.pluginmanager.get_plugin("terminalreporter")._tw = create_terminal_writer(config, config.stash[_OUTPUT])


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if RANK and exitstatus:
        sys.stderr.write(f"--- rank {RANK}\n{session.config.stash[_OUTPUT].getvalue()}")
        sys.stderr.flush()


_OUTPUT = pytest.StashKey[io.StringIO]()


@pytest.fixture(scope="session")
def context() -> Iterator[Context]:
    with open_context(use_mpi=True) as context:
        yield context


@pytest.fixture
def shared_path(context: Context, tmp_path: Path) -> Path:
    """One temporary folder for all ranks."""
    return context.on_root(lambda: tmp_path)


@pytest.fixture(scope="session")
def digits(context: Context, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """mnist-5k, prepared by all ranks together."""
    from hpc_train.datasets.prepare.prepare import prepare

    path = context.on_root(lambda: tmp_path_factory.mktemp("digits") / "mnist-5k.h5")
    prepare("mnist-5k", None, path, context)
    return path
