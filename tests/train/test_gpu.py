"""What only a GPU can show: skipped where torch finds none."""

import json
import re
import threading
from pathlib import Path
from time import perf_counter, sleep

import pytest
import torch
from torch import nn

from hpc_train.core.rundir import RunDir, find
from hpc_train.core.settings import Checkpoint, Train
from hpc_train.core.world import World
from hpc_train.train.comm.context import Context
from hpc_train.train.device import peak_flops
from hpc_train.train.energy.sensors.choose import choose_meters
from hpc_train.train.optimize import Optimizer
from hpc_train.train.reduce.sharded_weights import whole_parameters
from hpc_train.train.run.checkpoint.reading import read
from hpc_train.train.run.checkpoint.saver import Saver
from hpc_train.train.run.checkpoint.shares import Part, Share
from tests import jobs

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
CUDA = torch.device("cuda")


def losses(folder: Path) -> list[float]:
    (run,) = find([folder])
    rows = [line.split(",") for line in run.metrics.read_text().splitlines()]
    return [float(row[rows[0].index("loss")]) for row in rows[1:]]


def trained(name: str, digits: Path, folder: Path, ranks: int = 0, resume: str = "never", **keys: object) -> jobs.Ended:
    fixed = {"data__file": digits, "run__root": folder, "name": name, "train__steps": 40, "train__log_every": 1}
    words = jobs.settings(**{**fixed, "reduce__strategy": "mpi" if ranks else "local", **keys})
    return jobs.run(ranks, "train", jobs.CONFIGS / "mlp-mnist.toml", *words, "--resume", resume, cwd=folder)


def test_losses_are_those_of_a_cpu(digits: Path, tmp_path: Path) -> None:
    for device in ("cpu", "cuda"):
        done = trained(device, digits, tmp_path, train__device=device)
        assert done.code == 0, done.err
    assert losses(tmp_path / "cuda") == pytest.approx(losses(tmp_path / "cpu"), rel=1e-3)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_sixteen_bits_learn_the_same(digits: Path, tmp_path: Path, precision: str) -> None:
    for name in ("fp32", precision):
        done = trained(name, digits, tmp_path, train__precision=name, train__clip_norm=1.0, train__accumulate=2)
        assert done.code == 0, done.err
    assert losses(tmp_path / precision)[-1] == pytest.approx(losses(tmp_path / "fp32")[-1], rel=0.05)


def test_phases_are_told_by_waiting_and_joules_by_nvml(digits: Path, tmp_path: Path) -> None:
    done = trained("phases", digits, tmp_path, train__timing="phases")
    assert done.code == 0, done.err
    (run,) = find([tmp_path])
    summary, meta = json.loads(run.summary.read_text()), json.loads(run.meta.read_text())
    assert summary["phase_share"]["forward"] > 0 and summary["phase_share"]["optimizer"] > 0
    assert "NVML" in summary["energy_source"] and meta["device"] == torch.cuda.get_device_name()


def test_how_busy_the_gpu_was_is_recorded(digits: Path, tmp_path: Path) -> None:
    done = trained("use", digits, tmp_path)
    assert done.code == 0, done.err
    (run,) = find([tmp_path])
    meta = json.loads(run.meta.read_text())
    (busy,), (used_bytes,) = meta["loop_gpu_busy"], meta["loop_gpu_used_bytes"]
    total_bytes = torch.cuda.get_device_properties(0).total_memory
    assert 0 <= busy <= 1 and meta["peak_gpu_bytes"][0] <= used_bytes <= 1.1 * total_bytes


def test_a_run_continues_where_it_was_stopped(digits: Path, tmp_path: Path) -> None:
    keys: dict[str, object] = {"train__optimizer": "adamw", "train__lr": 0.001, "checkpoint__every_steps": 20}
    whole_run = trained("whole", digits, tmp_path, **keys)
    half = trained("half", digits, tmp_path, train__steps=20, **keys)
    assert whole_run.code == half.code == 0, whole_run.err + half.err
    again = trained("half", digits, tmp_path, resume=str(find([tmp_path / "half"])[0].path), **keys)
    assert again.code == 0, again.err
    assert losses(tmp_path / "half")[-1] == pytest.approx(losses(tmp_path / "whole")[-1], rel=1e-4)


def test_ranks_that_share_a_gpu_train_by_mpi_and_are_refused_by_nccl(digits: Path, tmp_path: Path) -> None:
    alone = trained("alone", digits, tmp_path)
    together = trained("together", digits, tmp_path, ranks=2)
    assert alone.code == together.code == 0, alone.err + together.err
    assert losses(tmp_path / "together") == pytest.approx(losses(tmp_path / "alone"), rel=1e-3)
    hvd = pytest.importorskip("horovod.torch")
    done = trained("nccl", digits, tmp_path, ranks=2, reduce__strategy="horovod")
    if torch.cuda.device_count() == 1 and hvd.nccl_built():
        assert done.code == 2 and re.search(r"ranks 0, 1 share one GPU of \S+, and NCCL wants one for each", done.err)
        assert done.err.count("NCCL") == 1, "on one rank"
    else:
        assert done.code == 0, done.err
        assert losses(tmp_path / "nccl") == pytest.approx(losses(tmp_path / "alone"), rel=1e-3)


@pytest.mark.parametrize("keys", [{"optimizer": "sgd", "momentum": 0.9}, {"optimizer": "adamw"}])
def test_an_update_with_clipping_makes_the_loop_wait_for_nothing(keys: dict[str, object]) -> None:
    def trainee(device: str) -> tuple[nn.Module, Optimizer]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2)).to(device)
        train = Train.model_validate({"steps": 9, "global_batch": 8, "lr": 0.1, "clip_norm": 0.1, **keys})
        return model, Optimizer(train, whole_parameters(model), 8, lambda value: value)

    (on_gpu, one), (on_cpu, other) = trainee("cuda"), trainee("cpu")
    for step in range(5):
        for model in (on_gpu, on_cpu):
            for number, each in enumerate(model.parameters()):
                each.grad = torch.full_like(each, float(step + number))
        other.step(step)
        torch.cuda.set_sync_debug_mode("error" if step else "default")  # buffers are made in the first
        try:
            one.step(step)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for here, there in zip(on_gpu.parameters(), on_cpu.parameters(), strict=True):
        assert torch.allclose(here.cpu(), there, atol=1e-5)


def test_a_checkpoint_leaves_a_gpu_through_memory_that_is_kept(tmp_path: Path) -> None:
    settings = Checkpoint.model_validate({"keep": 2})
    with Saver(RunDir(tmp_path), settings, {}, Context(World()), print) as saver:
        for step in (1, 2):
            weights = torch.full((1 << 20,), float(step), device=CUDA)
            blank = torch.empty_like(weights, device="meta")
            state = {"model": {"w": blank}, "optimizer": {}, "loss_scale": [1.0, 0], "task": {}}
            saver.save(step, Share(state, [Part("model/w", 0, weights)]))
            weights.fill_(-1.0)  # as the next step would
            saver._finish()
            place = saver._host_copy._buffers["model/w", 0]
            assert place.is_pinned()
            state, _ = read(RunDir(tmp_path).checkpoint(step))
            assert torch.equal(state["model"]["w"], torch.full((1 << 20,), float(step)))


def test_the_meter_counts_what_the_driver_says_it_draws() -> None:
    import pynvml

    meter = next(meter for meter in choose_meters(Path("/")).meters if meter.domain == "gpu-0")
    pynvml.nvmlInit()
    handle = pynvml.nvmlDeviceGetHandleByIndex(0)
    watts: list[float] = []
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.05):
            watts.append(pynvml.nvmlDeviceGetPowerUsage(handle) / 1e3)

    product = torch.randn(8192, 8192, device=CUDA, dtype=torch.bfloat16)
    watcher = threading.Thread(target=watch)
    sleep(1.0)
    watcher.start()
    began_s, first = perf_counter(), meter.read()
    while perf_counter() - began_s < 5:
        for _ in range(50):
            product @ product
        torch.cuda.synchronize()
    joules, seconds = meter.read() - first, perf_counter() - began_s
    done.set()
    watcher.join()
    mean = sum(watts) / len(watts)
    print(f"the counter says {joules / seconds:.0f} W, samples of the power {mean:.0f} W")
    assert joules / seconds == pytest.approx(mean, rel=0.15) and mean > 100


def test_the_peak_is_that_of_the_data_sheet() -> None:
    train = Train.model_validate({"steps": 1, "global_batch": 1, "precision": "bf16"})
    peak, source = peak_flops(train, CUDA)
    if peak is None:
        pytest.skip(f"no data sheet known of {torch.cuda.get_device_name()}")
    one = torch.randn(8192, 8192, device=CUDA, dtype=torch.bfloat16)
    for _ in range(5):
        one @ one
    torch.cuda.synchronize()
    began_s = perf_counter()
    for _ in range(20):
        one @ one
    torch.cuda.synchronize()
    reached = 20 * 2 * 8192**3 / (perf_counter() - began_s)
    print(f"{reached / 1e12:.0f} of {peak / 1e12:.0f} TFLOP/s ({source})")
    assert 0.4 * peak < reached <= peak
