from pathlib import Path

import pytest

from tests import jobs


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """mnist-5k in HDF5, prepared once by two ranks."""
    folder = tmp_path_factory.mktemp("data")
    done = jobs.run(2, "prepare", "mnist-5k", folder / "mnist-5k.h5", cwd=folder)
    assert done.code == 0, done.err
    return folder / "mnist-5k.h5"
