"""The generator keeps its laws: what other tests recover from its runs is really in them."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hpc_train.analysis.runs.load import load, load_all
from hpc_train.analysis.scaling.compare import compare
from tests import laws
from tests.laws import Laws, Slow


def test_a_step_takes_what_amdahl_and_the_ring_say(tmp_path: Path) -> None:
    law = Laws(serial=0.1, message_bytes=2e7, alpha_s=1e-5, beta_s_per_byte=2e-10, alpha_between_s=4e-5, overlap=0.2)
    laws.study(tmp_path, law, (1, 4, 16))
    for row in compare(load_all([tmp_path])).groups[0].rows:
        num = row.size
        useful = 0.080 * (0.1 + 0.9 / num)
        alpha = 4e-5 if num > 4 else 1e-5  # 4 ranks on a host
        ring = 2 * (num - 1) * alpha + 2 * (num - 1) / num * 2e7 * 2e-10
        exposed = max(1e-6, ring - 0.2 * 0.6 * useful)
        assert row.step_s == pytest.approx(useful + 0.0005 + exposed, rel=1e-6)
        assert row.phase_s["reduce"] == pytest.approx(exposed, rel=1e-4)


def test_the_energy_is_the_draw_times_the_time(tmp_path: Path) -> None:
    run, _ = laws.write(tmp_path, Laws(ranks=8, watts={"package-0": 150.0, "dram": 20.0}))
    loaded = load(run)
    whole_s = loaded.step_s.sum() + 10 * (3 * 0.01 + 0.0005 + loaded.step_s.mean() - 0.0105)  # warm-up: thrice the work
    assert loaded.summary.joules == pytest.approx(2 * 170.0 * whole_s, rel=0.01)
    unmetered, _ = laws.write(tmp_path, Laws(watts={}, stamp="20261124T000000Z"))
    assert load(unmetered).summary.joules is None


def test_only_the_slow_rank_is_slow_and_only_its_clock_s_host_is_off(tmp_path: Path) -> None:
    law = Laws(noise=0.1, slow=(Slow(5, 2.0, 0.25),), clock_offset_s=2.0)
    run, truth = laws.write(tmp_path, law)
    usual = truth.useful_s[[0, 1, 2, 3, 4, 6, 7]]
    assert np.ptp(usual) / usual.mean() < 0.05
    assert truth.useful_s[5] / usual.mean() == pytest.approx(1.25, abs=0.08)
    same, again = laws.write(tmp_path, replace(law, stamp="20261124T000000Z"))
    assert again.useful_s.tolist() == truth.useful_s.tolist()
    assert same.timings(3).read_bytes() == run.timings(3).read_bytes()
