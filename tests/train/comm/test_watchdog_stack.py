"""The stack that the watchdog sends of a thread that runs."""

import threading

from hpc_train.train.comm.watchdog import _stack_of


def deeper(depth: int, stop: threading.Event) -> None:
    if depth and not stop.is_set():
        deeper(depth - 1, stop)


def test_a_running_threads_stack_is_read_without_its_help() -> None:
    """Frames come and go meanwhile: walking them one by one crashed Python 3.11.2."""
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            deeper(40, stop)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        stacks = [_stack_of(thread.ident or 0, 2) for _ in range(300)]
    finally:
        stop.set()
        thread.join()
    assert any("deeper" in stack for stack in stacks)
    assert all(line.startswith("  ") and ":" in line for stack in stacks for line in stack.splitlines())
