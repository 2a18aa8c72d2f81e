"""The serial part of a job's time: by size, and as a law's one parameter."""

from dataclasses import replace
from pathlib import Path

import pytest

from hpc_train.analysis.report.sections.scaling import serial_table
from hpc_train.analysis.runs.load import load_all
from hpc_train.analysis.scaling.compare import Group, compare
from hpc_train.analysis.scaling.laws import fitted, serial_part
from tests import laws
from tests.laws import Laws

# Neither input nor messages, so that nothing but the serial part keeps the speedup from the ideal.
AMDAHL = Laws(serial=0.1, noise=0.02, input_s=0.0, message_bytes=0.0, alpha_s=0.0, ranks_per_host=8)


def group_of(root: Path, law: Laws, *sizes: int) -> Group:
    laws.study(root, law, sizes)
    (group,) = compare(load_all([root])).groups
    return group


def test_karp_and_flatt_find_amdahl_s_part_at_every_size(tmp_path: Path) -> None:
    group = group_of(tmp_path, replace(AMDAHL, noise=0.0), 1, 2, 8)
    parts = [serial_part(row) for row in group.rows]
    assert parts[0] is None
    assert [each.part for each in parts if each] == pytest.approx([0.1, 0.1], abs=1e-3)
    law = fitted(group)
    assert law is not None and law.serial == pytest.approx(0.1, abs=1e-3)
    table = serial_table(group)
    assert table is not None and table.title.endswith(
        "by Karp-Flatt at each size; Amdahl's law, fitted to all sizes: 10.0%"
    )
    assert [column.title for column in table.columns] == ["ranks", "serial part", "95% interval within one run"]
    assert table.rows[0][:2] == ("2", "10.0%")


def test_the_interval_of_the_serial_part_is_that_of_the_speedup(tmp_path: Path) -> None:
    row = group_of(tmp_path, AMDAHL, 1, 4).rows[1]
    part = serial_part(row)
    assert part is not None and part.interval is not None and row.speedup_interval is not None
    low, high = row.speedup_interval
    assert part.interval == pytest.approx(((1 / high - 0.25) / 0.75, (1 / low - 0.25) / 0.75))
    assert part.interval[0] < part.part < part.interval[1]


def test_weak_scaling_has_gustafson_s_part(tmp_path: Path) -> None:
    """A step of four ranks takes 12.5% longer than one of one rank: S = 4 / 1.125."""
    laws.write(tmp_path, replace(AMDAHL, weak=True, noise=0.0, ranks=1))
    laws.write(tmp_path, replace(AMDAHL, weak=True, noise=0.0, ranks=4, work_s=0.09))
    (group,) = compare(load_all([tmp_path])).groups
    part = serial_part(group.rows[1])
    assert part is not None and part.part == pytest.approx((4 - 4 / 1.125) / 3, abs=1e-3)
    alone = group_of(tmp_path / "one", AMDAHL, 4)
    assert serial_part(alone.rows[0]) is None and serial_table(alone) is None, "no baseline"
