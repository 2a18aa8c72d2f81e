"""The fixture `cluster`: one Slurm for all tests, reset after each."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm import slurm


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[slurm.Cluster]:
    """A real Slurm with nodes n1 to n4, which see the checkout, its virtual environment and pytest's folders."""
    reason = slurm.why_not()
    if reason:
        pytest.skip(f"no cluster here: {reason}")
    cluster = slurm.Cluster(shared=[tmp_path_factory.getbasetemp()])
    yield cluster
    cluster.down()


@pytest.fixture(autouse=True)
def as_new(cluster: slurm.Cluster) -> Iterator[None]:
    """Undoes what a test did to the cluster."""
    yield
    cluster.tidy()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Open MPI's own crash at start-up is the only failure after which a test runs again."""
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.flaky(reruns=2, only_rerun=["MpiCrash"]))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """A failed test shows what its jobs printed and what the daemons logged."""
    report = yield
    cluster = getattr(item, "funcargs", {}).get("cluster")
    if report.failed and cluster:
        report.sections.append(("the cluster", cluster.logs()))
    return report
