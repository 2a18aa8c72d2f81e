"""What a process used, against work of a known size."""

import os
from pathlib import Path
from time import process_time, sleep

from hpc_train.train.run.process_use import ProcessUse


def test_a_busy_process_uses_its_processor_and_a_sleeping_one_does_not() -> None:
    before = ProcessUse.now()
    sleep(0.2)
    slept = ProcessUse.now()
    end = process_time() + 0.2
    while process_time() < end:
        pass
    idle, busy = slept.since(before), ProcessUse.now().since(slept)
    assert idle.time_s >= 0.2 and idle.cpu_s < 0.1
    assert 0.19 <= busy.cpu_s < 0.4 and busy.cpu_s <= 1.1 * busy.time_s


def test_what_is_written_is_counted(tmp_path: Path) -> None:
    before = ProcessUse.now()
    with (tmp_path / "file").open("wb") as file:
        file.write(os.urandom(4 << 20))
        os.fsync(file.fileno())
    used = ProcessUse.now().since(before)
    if used.written_bytes:  # a tmpfs has no storage to write to
        assert used.written_bytes >= 4 << 20
