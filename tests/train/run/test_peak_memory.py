"""A rank's peak memory keeps counting what has been freed."""

import numpy as np
import torch

from hpc_train.train.run.peak_memory import peak_gpu_bytes, peak_resident_bytes

NUM_BYTES = 1 << 30


def test_the_peak_rises_by_what_was_used_and_stays() -> None:
    assert peak_gpu_bytes(torch.device("cpu")) is None
    before = peak_resident_bytes()
    used = np.ones(NUM_BYTES, np.uint8)
    within = peak_resident_bytes()
    del used
    after = peak_resident_bytes()
    assert before and within and after
    assert min(within, after) >= NUM_BYTES  # not one of them exactly: the kernel counts pages in batches (proc(5))
