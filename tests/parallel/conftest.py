"""Every rank runs these tests at the same time: mpirun -n N python -m mpi4py -m pytest tests/parallel."""

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


@pytest.hookimpl(trylast=True)  # after pytest has registered the terminal reporter
def pytest_configure(config: pytest.Config) -> None:
    if RANK:  # rank 0 prints; another rank does so only if it fails
        config.stash[_OUTPUT] = io.StringIO()
        config.pluginmanager.get_plugin("terminalreporter")._tw = create_terminal_writer(config, config.stash[_OUTPUT])


@pytest.hookimpl(wrapper=True, tryfirst=True)  # around the terminal reporter, which writes the tracebacks
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> Iterator[None]:
    yield
    if RANK and exitstatus:
        sys.stderr.write(f"--- rank {RANK}\n{session.config.stash[_OUTPUT].getvalue()}")
        sys.stderr.flush()


_OUTPUT = pytest.StashKey[io.StringIO]()
# test_rest needs a process in which Horovod has never been started; test_reduce_times restarts it many times.
_ORDER = {"test_rest.py": -1, "test_reduce_times.py": 1}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: _ORDER.get(item.path.name, 0))


@pytest.fixture(scope="session")
def context() -> Iterator[Context]:
    with open_context(use_mpi=True) as context:
        yield context


@pytest.fixture
def shared_path(context: Context, tmp_path: Path) -> Path:
    """A temporary folder that all ranks share."""
    return context.on_root(lambda: tmp_path)


@pytest.fixture(scope="session")
def digits(context: Context, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """mnist-5k in HDF5, prepared by all ranks."""
    from hpc_train.datasets.prepare.prepare import prepare

    path = context.on_root(lambda: tmp_path_factory.mktemp("digits") / "mnist-5k.h5")
    prepare("mnist-5k", None, path, context)
    return path
