"""Saving and reading back, without a job around it."""

import json
import os
import resource
import threading
from collections.abc import Callable
from pathlib import Path
from random import Random
from time import perf_counter
from types import SimpleNamespace
from typing import Any, cast

import h5py
import numpy as np
import pytest
import torch
import xxhash
from torch import nn

from hpc_train.core.config import load
from hpc_train.core.errors import UserError
from hpc_train.core.rundir import RunDir
from hpc_train.core.settings import Checkpoint, Train
from hpc_train.core.world import World
from hpc_train.train.comm.context import Context
from hpc_train.train.optimize import Optimizer
from hpc_train.train.reduce.sharded_weights import whole_parameters
from hpc_train.train.run.checkpoint import format, writing
from hpc_train.train.run.checkpoint.copy import HostCopy
from hpc_train.train.run.checkpoint.reading import read
from hpc_train.train.run.checkpoint.retention import checkpoints, path_of
from hpc_train.train.run.checkpoint.saver import Saver
from hpc_train.train.run.checkpoint.shares import Part, Share, UnusableCheckpoint, divide
from hpc_train.train.run.checkpoint.writing import write
from hpc_train.train.training_state import TrainingState
from tests import checkpoints as checkpoints_of
from tests import jobs

FACTS = {"size": 1, "global_batch": 8, "num_samples": 100}


def saver(path: Path, said: list[str] | None = None, **settings: object) -> Saver:
    run = RunDir(path)
    run.checkpoints_dir.mkdir(exist_ok=True)
    chosen = Checkpoint.model_validate(settings)
    return Saver(run, chosen, FACTS, Context(World()), (said if said is not None else []).append)


def trained(width: int = 8, **keys: object) -> tuple[nn.Module, Optimizer]:
    model = nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width))
    settings = Train.model_validate({"steps": 10, "global_batch": 4, "lr": 0.1, **keys})
    chosen = Optimizer(settings, whole_parameters(model), 4, lambda value: value)
    for step in range(3):
        model(torch.randn(4, width)).square().sum().backward()
        chosen.step(step)
        model.zero_grad()
    return model, chosen


def state_of(model: nn.Module, optimizer: Optimizer) -> Share:
    """All of a state, as one rank holds it."""
    return Share({"model": model.state_dict(), "optimizer": optimizer.state(), "loss_scale": [1.0, 0], "task": {}}, [])


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lars", "lamb"])
def test_what_is_read_is_what_was_saved(tmp_path: Path, optimizer: str) -> None:
    model, chosen = trained(optimizer=optimizer, momentum=0.9)
    with saver(tmp_path) as saves:
        assert saves.save_now(7, state_of(model, chosen)) == f"Saved: {tmp_path}/checkpoints/step-00000007.h5."
    again, other = trained(optimizer=optimizer, momentum=0.9)
    state, facts = checkpoints_of.read_newest(RunDir(tmp_path), again, print)
    again.load_state_dict(state["model"])
    other.load(state["optimizer"])
    assert facts["step"] == 7 and facts["global_batch"] == 8
    for ours, theirs in zip(again.state_dict().values(), model.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)
    model(torch.ones(4, 8)).sum().backward()
    again(torch.ones(4, 8)).sum().backward()
    chosen.step(3)
    other.step(3)
    for ours, theirs in zip(again.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs), "the optimizer's state came back, too"


def test_the_caller_waits_for_the_copy_alone_and_the_write_is_finished_at_the_end(tmp_path: Path) -> None:
    """64 MB, on a disk that takes them slowly: the writer's calls are slowed from outside."""
    model, chosen = nn.Linear(4000, 4000), trained(optimizer="sgd")[1]
    release = threading.Event()
    original = writing._sync_folder
    writing._sync_folder = lambda folder: (release.wait(20), original(folder))[1]
    said: list[str] = []
    try:
        copies = []
        for _ in range(5):
            began_s = perf_counter()
            {name: tensor.detach().to("cpu", copy=True) for name, tensor in model.state_dict().items()}
            copies.append(perf_counter() - began_s)
        with saver(tmp_path, said) as saves:
            began_s = perf_counter()
            saves.save(1, state_of(model, chosen))
            took_s = perf_counter() - began_s
            assert not RunDir(tmp_path).checkpoint(1).exists(), "still being written"
            saves.save(2, state_of(model, chosen))
            assert "Checkpoint of step 2 skipped" in said[0], "a second one does not wait for the first"
            release.set()
        assert RunDir(tmp_path).checkpoint(1).exists(), "finished before the end"
    finally:
        writing._sync_folder = original
    assert took_s < 10 * max(copies) + 0.1, (took_s, copies)
    read(RunDir(tmp_path).checkpoint(1))


def test_without_memory_for_a_copy_the_caller_waits_for_the_write(tmp_path: Path) -> None:
    weight, said = torch.rand(32 << 20), list[str]()
    state = {"model": {"weight": weight.to("meta")}, "optimizer": {}, "loss_scale": [1.0, 0], "task": {}}
    share = Share(state, [Part("model/weight", 0, weight)])
    limits, lines = resource.getrlimit(resource.RLIMIT_DATA), Path("/proc/self/status").read_text().splitlines()
    used = next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmData:"))
    expected = weight[:5].tolist()
    with saver(tmp_path, said) as saves:
        resource.setrlimit(resource.RLIMIT_DATA, (used + (64 << 20), limits[1]))
        try:
            saves.save(2, share)
            weight.zero_()  # as the next step would
        finally:
            resource.setrlimit(resource.RLIMIT_DATA, limits)
    assert said == ["No memory for a copy of what rank 0 saves: training waits while checkpoints are written"]
    found = read(tmp_path / "checkpoints/step-00000002.h5")[0]["model"]["weight"]
    assert found[:5].tolist() == expected and found.min() >= 0 and found.max() > 0.99


def test_a_copy_reuses_the_memory_of_the_one_before_where_parts_are_alike() -> None:
    host_copy = HostCopy()
    first = host_copy.take([Part("model/a", 0, torch.zeros(3)), Part("model/b", 0, torch.zeros(2))])
    parts = [
        Part("model/a", 0, torch.arange(3.0)),
        Part("model/b", 0, torch.ones(4)),
        Part("model/b", 4, torch.ones(1)),
    ]
    copies = host_copy.take(parts)
    assert copies[0].numbers.data_ptr() == first[0].numbers.data_ptr() != parts[0].numbers.data_ptr()
    for copied, part in zip(copies, parts, strict=True):
        assert copied[:2] == part[:2] and torch.equal(copied.numbers, part.numbers)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 7, 64])
def test_ranks_that_hold_the_same_divide_it_into_equal_contiguous_parts(num_ranks: int) -> None:
    lengths = [5, 11_000_001, 0, 1, 9_000_000, 3]
    tensors = [torch.empty(length, dtype=torch.int8 if length == 9_000_000 else torch.float32) for length in lengths]
    divided = divide(tensors, num_ranks)
    assert [each for of_rank in divided for each in of_rank if each[0] == 0] == [(0, 0, 5)]
    at = dict.fromkeys(range(len(lengths)), 0)
    for number, begin, end in (each for of_rank in divided for each in of_rank):
        assert begin == at[number] < end
        at[number] = end
    assert list(at.values()) == lengths
    loads = [sum((end - begin) * tensors[number].itemsize for number, begin, end in of_rank) for of_rank in divided]
    busy = [load for load in loads if load]
    assert len(busy) == min(num_ranks, 53_000_040 >> 24), "16 MiB each at least"
    assert max(busy) - min(busy) <= 8
    if num_ranks == 64:
        assert [rank for rank, load in enumerate(loads) if load] == [0, 21, 42], "on different nodes"


def test_weights_that_are_no_numbers_never_displace_good_ones(tmp_path: Path) -> None:
    model, chosen = trained()
    said: list[str] = []
    with saver(tmp_path, said, keep=1) as saves:
        saves.save_now(1, state_of(model, chosen))
        with torch.no_grad():
            next(model.parameters())[0, 0] = float("nan")
        saves.save(2, state_of(model, chosen))
    assert "holds NaN or infinity" in said[0]
    assert [each.name for each in checkpoints(RunDir(tmp_path))] == ["step-00000001.h5"]


def test_the_newest_are_kept_and_nothing_is_saved_where_none_is_wanted(tmp_path: Path) -> None:
    model, chosen = trained()
    with saver(tmp_path, keep=2) as saves:
        for step in (1, 2, 3, 12):
            saves.save_now(step, state_of(model, chosen))
    assert [each.name for each in checkpoints(RunDir(tmp_path))] == ["step-00000012.h5", "step-00000003.h5"]
    with saver(tmp_path, keep=0, every_steps=1) as saves:
        assert not saves.is_due_after(20) and not saves.is_due_by_time
        assert "Nothing is saved" in saves.save_now(20, state_of(model, chosen))
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2


def test_time_and_steps_ask_for_checkpoints(tmp_path: Path) -> None:
    often = saver(tmp_path, every_steps=5, every_minutes=0)
    assert [step for step in range(1, 12) if often.is_due_after(step)] == [5, 10] and not often.is_due_by_time
    assert saver(tmp_path, every_minutes=1e-9).is_due_by_time and not saver(tmp_path, every_minutes=1).is_due_by_time


def test_a_refused_checkpoint_counts_for_none_that_are_kept(tmp_path: Path) -> None:
    """The run goes on before it: what is saved then must not be removed as older than the refused one."""
    model, chosen = trained()
    with saver(tmp_path, keep=2) as saves:
        for step in (10, 20):
            saves.save_now(step, state_of(model, chosen))
    RunDir(tmp_path).checkpoint(20).write_bytes(b"")
    with saver(tmp_path, keep=1) as saves:
        saves.save_now(13, state_of(model, chosen))
    assert [each.name for each in checkpoints(RunDir(tmp_path))] == ["step-00000020.h5", "step-00000013.h5"]
    _, facts = checkpoints_of.read_newest(RunDir(tmp_path), model, print)
    assert facts["step"] == 13
    with saver(tmp_path, keep=1) as saves:
        saves.save_now(21, state_of(model, chosen))
    assert [each.name for each in checkpoints(RunDir(tmp_path))] == ["step-00000021.h5"]


def test_a_flipped_bit_anywhere_is_refused_and_one_in_a_tensor_names_it(tmp_path: Path) -> None:
    model, chosen = trained(width=40, optimizer="adamw")
    with saver(tmp_path) as saves:
        saves.save_now(3, state_of(model, chosen))
    path = RunDir(tmp_path).checkpoint(3)
    whole = path.read_bytes()
    with h5py.File(path) as file:
        begin = file["model/0.weight"].id.get_offset()
    inside = range(begin, begin + 40 * 40 * 4)
    header = len(whole[:4096].rstrip(b"\0"))
    draw = Random(0)
    places = [*range(header + 8), *(draw.randrange(4096, len(whole)) for _ in range(3000)), *draw.choices(inside, k=20)]
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(UnusableCheckpoint) as refused:
            read(path)
        if place in inside:
            assert str(refused.value).startswith("model/0.weight is damaged in bytes 0 to 6400")
    for length in (0, 1, 4095, 4096, 5000, len(whole) - 1, len(whole) + 1):
        path.write_bytes((whole + b"\0")[:length])
        with pytest.raises(UnusableCheckpoint):
            read(path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(UnusableCheckpoint, match=r"cannot be read|does not begin"):
        read(path)


def test_any_program_reads_the_tensors(tmp_path: Path) -> None:
    """As h5py does, by the parameters' own names; a tensor larger than a piece and some that HDF5 has no dtype for."""
    large = torch.randn(1500, 1001)
    last = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    weights = {"blocks.0.attn.qkv.weight": large, "mask": torch.tensor([True, False]), "none": torch.empty(0, 3)}
    weights |= {"half": torch.randn(5).bfloat16(), "channels_last": last}
    optimizer = {name: {"step": torch.tensor(7.0), "exp_avg": torch.randn(3)} for name in ("a/b", "c")}
    task = {"replay": torch.arange(3), "num": [1, None, float("inf")], 5: (b"x", True, "\udcff")}
    state = {"model": weights, "optimizer": optimizer, "loss_scale": [1.5, 0], "task": task}
    path = tmp_path / "step-00000009.h5"
    write(path, state, {"step": 9, **FACTS})
    with h5py.File(path) as file:
        assert (file["model/blocks.0.attn.qkv.weight"][:] == large.numpy()).all()
        assert (file["model/channels_last"][:] == last.numpy()).all()
        assert file["model/half"].dtype == np.uint16 and file["model/half"].attrs["dtype"] == "bfloat16"
        assert (file["optimizer/exp_avg/c"][:] == optimizer["c"]["exp_avg"].numpy()).all()
        assert file["optimizer/step"][:].tolist() == [7, 7] and file["optimizer/step.rows"][:].tolist() == [
            b"a/b",
            b"c",
        ]
        assert (file.attrs["format"], file.attrs["step"], file["loader"].attrs["global_batch"]) == (3, 9, 8)
        table = file["pieces"][:]
        rows = table[table["data_set"] == b"model/blocks.0.attn.qkv.weight"]
        assert rows["begin"].tolist() == [0, 4 << 20] and rows["end"].tolist() == [4 << 20, large.nbytes]
    again, facts = read(path)
    assert facts["format"] == 3 and {key: facts[key] for key in FACTS} == FACTS
    assert again["task"].pop("replay").tolist() == [0, 1, 2] and again["loss_scale"] == [1.5, 0]
    assert again["task"] == {key: value for key, value in task.items() if key != "replay"}
    for name, tensor in weights.items():
        assert again["model"][name].dtype == tensor.dtype and torch.equal(again["model"][name], tensor)
    assert again["optimizer"]["a/b"]["step"].shape == () and again["optimizer"].keys() == optimizer.keys()


def seal(path: Path) -> None:
    """Gives an altered file the checksums that fit it, as somebody who means harm would."""
    content = path.read_bytes()
    facts = json.loads(content[:4096].split(b"\n")[1])
    begin, length = facts["pieces_offset"], facts["pieces_bytes"]
    table = content[begin : begin + length]
    rows = format._rows(table, facts["num_pieces"])
    facts |= {"bytes": len(content), "pieces_xxh3": xxhash.xxh3_64_intdigest(table)}
    facts["others_xxh3"] = format._checksum_of_others(
        rows, (begin, length), len(content), lambda first, last: content[first:last]
    )
    path.write_bytes(format._header(facts) + content[4096:])


def _replaced(file: h5py.File, **keys: Any) -> None:
    del file["model/0.weight"]
    file.create_dataset("model/0.weight", **keys).attrs["dtype"] = "float32"


def _linked_out(file: h5py.File) -> None:
    del file["model/0.weight"]
    file["model/0.weight"] = h5py.ExternalLink("x.h5", "y")


def _structure(file: h5py.File, content: Any) -> None:
    del file["structure"]
    file["structure"] = content


HOSTILE: dict[str, Callable[[h5py.File], object]] = {
    "missing": lambda file: file.pop("model/0.weight"),
    "in chunks": lambda file: _replaced(file, data=np.ones((8, 8), "f4"), chunks=(4, 4)),
    "huge and empty": lambda file: _replaced(file, shape=(1 << 20, 1 << 20), dtype="f4", chunks=(1, 1)),
    "huge and not allocated": lambda file: _replaced(file, shape=(1 << 20, 1 << 20), dtype="f4"),
    "in another file": lambda file: _replaced(file, shape=(8, 8), dtype="f4", external="/etc/passwd"),
    "a link out": _linked_out,
    "of another dtype": lambda file: file["model/0.weight"].attrs.modify("dtype", "float64"),
    "of no dtype": lambda file: file["model/0.weight"].attrs.modify("dtype", "Tensor"),
    "another step": lambda file: file.attrs.modify("step", 4),
    "no format": lambda file: file.attrs.pop("format"),
    "no structure": lambda file: file.pop("structure"),
    "structure of a number": lambda file: _structure(file, 3),
    "deep structure": lambda file: _structure(file, np.bytes_(b"[" * 100000)),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_with_checksums_that_fit_is_refused(tmp_path: Path, name: str) -> None:
    model, chosen = trained()
    with saver(tmp_path) as saves:
        saves.save_now(3, state_of(model, chosen))
    path = RunDir(tmp_path).checkpoint(3)
    seal(path)
    read(path)
    with h5py.File(path, "r+") as file:
        HOSTILE[name](file)
    with pytest.raises(UnusableCheckpoint, match=r"damaged|bytes"):
        read(path)
    seal(path)
    with pytest.raises(UnusableCheckpoint):
        read(path)


def test_checkpoints_of_earlier_versions_are_read_and_count(tmp_path: Path) -> None:
    model, chosen = trained(optimizer="adamw")
    run = RunDir(tmp_path)
    with saver(tmp_path, keep=2) as saves:
        for step in (1, 2):
            saves.save_now(step, state_of(model, chosen))
            checkpoints_of.as_format_2(run.checkpoint(step))
        assert [each.name for each in checkpoints(run)] == ["step-00000002", "step-00000001"]
        assert path_of(run, 2) == run.checkpoints_dir / "step-00000002"
        state, facts = checkpoints_of.read_newest(run, model, print)
        assert facts["step"] == 2 and facts["format"] == 2
        assert all(torch.equal(state["model"][name], each) for name, each in model.state_dict().items())
        saves.save_now(3, state_of(model, chosen))
        assert [each.name for each in checkpoints(run)] == ["step-00000003.h5", "step-00000002"]
    (run.checkpoints_dir / "step-00000002/state.pt").write_bytes(b"")
    with saver(tmp_path, keep=9) as saves:
        saves.save_now(2, state_of(model, chosen))
    assert [each.name for each in checkpoints(run)] == ["step-00000003.h5", "step-00000002.h5"], (
        "the refused one is gone"
    )


class Counts(nn.Linear):
    """A module with a state that is no tensor, which `state` decides."""

    state: object = 7

    def get_extra_state(self) -> object:
        return self.state

    def set_extra_state(self, state: object) -> None:
        self.state = state


def test_a_models_extra_state_is_kept_and_what_cannot_be_saved_is_told(tmp_path: Path) -> None:
    model = Counts(2, 2)
    chosen = trained(optimizer="sgd")[1]
    with saver(tmp_path) as saves:
        saves.save_now(1, state_of(model, chosen))
        state, _ = checkpoints_of.read_newest(RunDir(tmp_path), model, print)
        assert state["model"]["_extra_state"] == 7
        model.state = threading.Lock()
        with pytest.raises(
            UserError, match="the checkpoint of step 2 was not written: TypeError: model/_extra_state is of type lock"
        ):
            saves.save_now(2, state_of(model, chosen))
    assert [each.name for each in checkpoints(RunDir(tmp_path))] == ["step-00000001.h5"]


_OTHERS = {"optimizer": {}, "loss_scale": [1.0, 0], "task": {}}


@pytest.mark.parametrize(
    "content", [b"", b"text", [1], {"model": 1, **_OTHERS}, {"model": {"0.weight": 1}, **_OTHERS}, {"model": {}}]
)
def test_what_another_program_wrote_is_refused(tmp_path: Path, content: object) -> None:
    """Even with a checksum that fits."""
    checkpoints_of.write_format_2(tmp_path / "checkpoints/step-00000003", content, {"step": 3, **FACTS})
    said: list[str] = []
    with pytest.raises(UserError, match=r"no checkpoint of .*\n.*step-00000003"):
        checkpoints_of.read_newest(RunDir(tmp_path), trained()[0], said.append)
    assert not said  # the error says it all


def _like(change: Callable[[dict[str, Any]], object]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """A whole state, changed in one place."""

    def changed(state: dict[str, Any]) -> dict[str, Any]:
        change(state)
        return state

    return changed


RESEALED = {
    "optimizer is no dict": _like(lambda s: s.update(optimizer=[1])),
    "another parameter": _like(lambda s: s["optimizer"].update({"9.weight": {}})),
    "no moments": _like(lambda s: s["optimizer"]["0.weight"].pop("exp_avg")),
    "another optimizer's": _like(lambda s: s["optimizer"].update({"0.weight": {"momentum_buffer": torch.ones(8, 8)}})),
    "another shape": _like(lambda s: s["optimizer"]["0.weight"].update(exp_avg=torch.ones(1))),
    "another dtype": _like(lambda s: s["optimizer"]["0.bias"].update(exp_avg_sq=torch.ones(8, dtype=torch.float16))),
    "a number": _like(lambda s: s["optimizer"]["0.bias"].update(step=3)),
    "steps of every weight": _like(lambda s: s["optimizer"]["0.bias"].update(step=torch.ones(8))),
    "no dict of a parameter": _like(lambda s: s["optimizer"].update({"0.bias": torch.ones(8)})),
    "scale is None": _like(lambda s: s.update(loss_scale=None)),
    "scale of one": _like(lambda s: s.update(loss_scale=[1.0])),
    "scale 0": _like(lambda s: s.update(loss_scale=[0.0, 0])),
    "scale NaN": _like(lambda s: s.update(loss_scale=[float("nan"), 0])),
    "scale of tensors": _like(lambda s: s.update(loss_scale=[torch.ones(1), 0])),
    "a task's state": _like(lambda s: s.update(task={"replay": torch.ones(3)})),
    "task is a list": _like(lambda s: s.update(task=[])),
    "sparse weights": _like(lambda s: s["model"].update({"0.weight": s["model"]["0.weight"].to_sparse()})),
    "weights without memory": _like(lambda s: s["model"].update({"0.weight": torch.ones(8, 8, device="meta")})),
    "weights to be trained": _like(lambda s: s["model"].update({"0.weight": nn.Parameter(torch.ones(8, 8))})),
    "one number for many": _like(lambda s: s["task"].update(replay=torch.ones(1).expand(10**13))),
}


NO_TENSORS = {"sparse weights", "weights without memory"}
ONLY_2 = {"weights to be trained", "one number for many"}  # format 3 writes what they hold, or runs out of memory


@pytest.mark.parametrize(
    ("name", "is_format_2"), [(name, old) for name in RESEALED for old in (False, True) if old or name not in ONLY_2]
)
def test_a_checkpoint_sealed_again_with_another_state_is_passed_over(
    tmp_path: Path, name: str, is_format_2: bool
) -> None:
    """Its checksum is right; what it holds is not what this job wants, and the one before it is used."""
    model, chosen = trained(optimizer="adamw")
    with saver(tmp_path) as saves:
        saves.save_now(3, state_of(model, chosen))
    damaged = RESEALED[name](checkpoints_of.state(RunDir(tmp_path).checkpoint(3)))
    facts = {"step": 4, **FACTS}
    if is_format_2:
        checkpoints_of.write_format_2(tmp_path / "checkpoints/step-00000004", damaged, facts)
    elif name in NO_TENSORS:
        with pytest.raises((TypeError, RuntimeError)):
            write(RunDir(tmp_path).checkpoint(4), damaged, facts)
        assert not list(RunDir(tmp_path).checkpoints_dir.glob(".*")), "what was begun is removed"
        return
    else:
        write(RunDir(tmp_path).checkpoint(4), damaged, facts)
    config = load(jobs.CONFIGS / "softmax-mnist.toml", ("train.optimizer=adamw",)).config
    job = cast(Any, SimpleNamespace(task=SimpleNamespace(keeps_state=False), model=model, config=config))
    check = TrainingState(job, cast(Any, None), chosen).check
    said: list[str] = []
    state, facts = checkpoints_of.read_newest(RunDir(tmp_path), model, said.append, check)
    assert facts["step"] == 3 and "step-00000004" in said[0], said
    chosen.load(state["optimizer"])
    RunDir(tmp_path).checkpoint(3).rename(tmp_path / "gone")
    with pytest.raises(UserError, match="no checkpoint of"):
        checkpoints_of.read_newest(RunDir(tmp_path), model, said.append, check)


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    class Harm:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.touch, (tmp_path / "harm",))

    folder = tmp_path / "checkpoints" / "step-00000001"
    harmful = {"model": {}, "optimizer": {}, "loss_scale": [], "task": {}, "harm": Harm()}
    checkpoints_of.write_format_2(folder, harmful, {"step": 1, **FACTS})
    with pytest.raises(UnusableCheckpoint, match=r"holds no tensors"):
        read(folder)
    assert not (tmp_path / "harm").exists()


def test_no_checkpoint_at_all_is_a_beginning_and_none_that_is_good_an_error(tmp_path: Path) -> None:
    model, chosen = trained()
    assert checkpoints_of.read_newest(RunDir(tmp_path), model, print) == ({}, {})
    with saver(tmp_path) as saves:
        saves.save_now(3, state_of(model, chosen))
    RunDir(tmp_path).checkpoint(3).write_text("[]")
    with pytest.raises(UserError, match="no checkpoint of"):
        checkpoints_of.read_newest(RunDir(tmp_path), model, print)
