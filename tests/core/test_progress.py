"""What a person sees on a terminal, and what a log keeps."""

import os
import pty
import re
import subprocess
from pathlib import Path
from time import perf_counter_ns

import pytest

from hpc_train.core.progress import StepProgress
from tests import jobs


def on_a_terminal(words: list[str], cwd: Path) -> str:
    """All that a command writes to a terminal of its own."""
    screen, terminal = pty.openpty()
    job = subprocess.Popen(
        words, cwd=cwd, env=jobs.environment(TERM="xterm"), stdin=subprocess.DEVNULL, stdout=terminal, stderr=terminal
    )
    os.close(terminal)
    shown = b""
    while True:
        try:
            part = os.read(screen, 65536)
        except OSError:  # the terminal's last user has gone
            break
        if not part:
            break
        shown += part
    os.close(screen)
    assert job.wait(60) == 0, shown.decode()
    return shown.decode()


@pytest.mark.parametrize("ranks", [0, 2])
def test_a_terminal_shows_a_bar_with_loss_speed_and_time_left(tmp_path: Path, digits: Path, ranks: int) -> None:
    keys = jobs.settings(data__file=digits, train__steps=2000, reduce__strategy="mpi" if ranks else "local")
    keys += jobs.settings(data__hold_out=0.1, validation__every_steps=1000)
    shown = on_a_terminal(jobs.command(ranks, "train", jobs.CONFIGS / "softmax-mnist.toml", *keys), tmp_path)
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)
    assert re.search(r"softmax-mnist .*\d+% loss \d\.\d{5} [\d,]+ samples/s [\d:]+ left", plain), plain[-2000:]
    assert re.search(r"% loss \d\.\d{5}, val\. \d\.\d{2,4} [\d,]+ samples/s [\d:]+ left", plain), plain[-2000:]
    assert plain.count("Step 1900, Loss: ") == 1, "lines stand above the bar, from one rank"


def test_a_log_keeps_plain_lines(tmp_path: Path, digits: Path) -> None:
    done = jobs.run(2, "train", jobs.CONFIGS / "softmax-mnist.toml", *jobs.settings(data__file=digits), cwd=tmp_path)
    assert done.code == 0 and done.err == ""
    assert "\x1b" not in done.out and "\r" not in done.out
    assert len(done.out.splitlines()) == 1 + 10 + 4, done.out
    assert "Data: train/inputs of " in done.out.splitlines()[0] and "from a memory map" in done.out.splitlines()[0]


def test_a_part_of_a_run_has_lines_and_a_bar_of_its_own(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")  # a dumb terminal shows no bar
    steps = StepProgress("job", 10, "plain", is_root=True)
    test = StepProgress("test", 4000, "plain", is_root=True, counted="samples", above=steps)
    began_ns = perf_counter_ns()
    test.advance(1000, 1000, began_ns + 1_000_000_000)
    assert capsys.readouterr().out == "", "a line in half a minute"
    test.advance(2000, 1000, began_ns + 40_000_000_000)
    assert re.fullmatch(r"  test: 2000 of 4000 \(50%\), 50 samples/s, 0:40 left\n", capsys.readouterr().out)
    steps.close()
    with_bar = StepProgress("job", 10, "bar", is_root=True)
    part = StepProgress("validation", 4000, "bar", is_root=True, counted="samples", above=with_bar)
    part.advance(2000, 2000, perf_counter_ns() + 1_000_000_000)
    part.close()
    with_bar.advance(5, 5, perf_counter_ns() + 2_000_000_000)
    with_bar.close()
    shown = capsys.readouterr().out
    assert re.search(r"job .*\n?.*validation .*50%", shown, re.DOTALL) and not with_bar.is_open
    assert "validation" not in shown.rpartition("job")[2], "gone once it is over"
