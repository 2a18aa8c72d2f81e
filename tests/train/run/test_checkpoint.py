"""Saving and reading back, without a job around it."""

import json
import threading
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from time import perf_counter
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import nn

from hpc_train.core.config import load
from hpc_train.core.errors import UserError
from hpc_train.core.rundir import RunDir
from hpc_train.core.settings import Checkpoint, Train
from hpc_train.core.world import World
from hpc_train.train.comm.context import Context
from hpc_train.train.optimize import Optimizer
from hpc_train.train.reduce.sharded_weights import whole_parameters
from hpc_train.train.run.checkpoint import format
from hpc_train.train.run.checkpoint.copy import HostCopy
from hpc_train.train.run.checkpoint.format import UnusableCheckpoint
from hpc_train.train.run.checkpoint.pieces import Piece, assemble, local_pieces, skeleton
from hpc_train.train.run.checkpoint.restore import broadcast, read_newest
from hpc_train.train.run.checkpoint.retention import checkpoints
from hpc_train.train.run.checkpoint.saver import Saver
from hpc_train.train.training_state import TrainingState
from tests import jobs

FACTS = {"size": 1, "global_batch": 8, "num_samples": 100}


def saver(path: Path, said: list[str] | None = None, **settings: object) -> Saver:
    run = RunDir(path)
    run.checkpoints_dir.mkdir(exist_ok=True)
    chosen = Checkpoint.model_validate(settings)
    return Saver(run, chosen, FACTS, is_root=True, log=(said if said is not None else []).append)


def trained(width: int = 8, **keys: object) -> tuple[nn.Module, Optimizer]:
    model = nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width))
    settings = Train.model_validate({"steps": 10, "global_batch": 4, "lr": 0.1, **keys})
    chosen = Optimizer(settings, whole_parameters(model), 4, lambda value: value)
    for step in range(3):
        model(torch.randn(4, width)).square().sum().backward()
        chosen.step(step)
        model.zero_grad()
    return model, chosen


def state_of(model: nn.Module, optimizer: Optimizer) -> dict[str, object]:
    return {"model": model.state_dict(), "optimizer": optimizer.state(), "loss_scale": [1.0, 0], "task": {}}


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lars", "lamb"])
def test_what_is_read_is_what_was_saved(tmp_path: Path, optimizer: str) -> None:
    model, chosen = trained(optimizer=optimizer, momentum=0.9)
    with saver(tmp_path) as saves:
        assert saves.save_now(7, state_of(model, chosen)) == f"Saved: {tmp_path}/checkpoints/step-00000007."
    again, other = trained(optimizer=optimizer, momentum=0.9)
    state, facts = read_newest(RunDir(tmp_path), again, print)
    again.load_state_dict(state["model"])
    other.load(broadcast(state, Context(World()))["optimizer"])
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
    original = format._sync_folder
    format._sync_folder = lambda folder: (release.wait(20), original(folder))[1]
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
        format._sync_folder = original
    assert took_s < 10 * max(copies) + 0.1, (took_s, copies)
    format.read(RunDir(tmp_path).checkpoint(1))


def test_a_copy_reuses_the_memory_of_the_one_before_where_tensors_are_alike() -> None:
    host_copy = HostCopy()
    first = host_copy.take(
        local_pieces({"model": {"a": torch.zeros(3), "b": torch.zeros(2)}, "more": [torch.zeros(1), 1]})
    )
    state = {"model": {"a": torch.arange(3.0), "b": torch.ones(4), "c": torch.ones(1)}, "more": [torch.ones(1), 2]}
    copies = host_copy.take(local_pieces(state))
    again = assemble(skeleton(state), copies)
    assert again["model"]["a"].data_ptr() == first[0].tensor.data_ptr() != state["model"]["a"].data_ptr()
    assert again["model"]["b"].shape == (4,) and again["more"][1] == 2
    assert all(torch.equal(again["model"][name], state["model"][name]) for name in "abc")
    assert again["more"][0].item() == 1


def test_a_state_is_assembled_from_the_pieces_that_several_ranks_hold() -> None:
    whole = torch.arange(24.0).reshape(4, 6)
    state = {"model": {"0.weight": whole, "0.bias": torch.ones(4)}, "loss_scale": [1.0, 0]}
    name, global_shape, _, _ = local_pieces(state)[0]
    assert (name, global_shape) == ("model/0.weight", (4, 6))
    parts = [
        Piece(name, global_shape, (top, left), whole[top : top + 2, left : left + 3])
        for top in (0, 2)
        for left in (0, 3)
    ]
    again = assemble(skeleton(state), [*parts, *local_pieces(state)[1:]])
    assert torch.equal(again["model"]["0.weight"], whole)
    assert again["loss_scale"] == [1.0, 0]


def test_weights_that_are_no_numbers_never_displace_good_ones(tmp_path: Path) -> None:
    model, chosen = trained()
    said: list[str] = []
    with saver(tmp_path, said, keep=1) as saves:
        saves.save_now(1, state_of(model, chosen))
        with torch.no_grad():
            next(model.parameters())[0, 0] = float("nan")
        saves.save(2, state_of(model, chosen))
    assert "holds NaN or infinity" in said[0]
    assert [each.name for each in checkpoints(RunDir(tmp_path))] == ["step-00000001"]


def test_the_newest_are_kept_and_nothing_is_saved_where_none_is_wanted(tmp_path: Path) -> None:
    model, chosen = trained()
    with saver(tmp_path, keep=2) as saves:
        for step in (1, 2, 3, 12):
            saves.save_now(step, state_of(model, chosen))
    assert [each.name for each in checkpoints(RunDir(tmp_path))] == ["step-00000012", "step-00000003"]
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
    (RunDir(tmp_path).checkpoint(20) / "state.pt").write_bytes(b"")
    with saver(tmp_path, keep=1) as saves:
        saves.save_now(13, state_of(model, chosen))
    assert [each.name for each in checkpoints(RunDir(tmp_path))] == ["step-00000020", "step-00000013"]
    _, facts = read_newest(RunDir(tmp_path), model, print)
    assert facts["step"] == 13
    with saver(tmp_path, keep=1) as saves:
        saves.save_now(21, state_of(model, chosen))
    assert [each.name for each in checkpoints(RunDir(tmp_path))] == ["step-00000021"]


def test_a_flipped_bit_anywhere_is_found(tmp_path: Path) -> None:
    model, chosen = trained()
    with saver(tmp_path) as saves:
        saves.save_now(3, state_of(model, chosen))
    folder = RunDir(tmp_path).checkpoint(3)
    path = folder / "checkpoint.json"
    whole = path.read_bytes()
    for bit in range(8 * len(whole)):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            format.read(folder)
        except UnusableCheckpoint:
            continue
        assert json.loads(damaged) == json.loads(whole), "white space alone"


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
        state, _ = read_newest(RunDir(tmp_path), model, print)
        assert state["model"]["_extra_state"] == 7
        model.state = threading.Lock()
        with pytest.raises(UserError, match="the checkpoint of step 2 was not written: TypeError: cannot pickle"):
            saves.save_now(2, state_of(model, chosen))
    assert [each.name for each in checkpoints(RunDir(tmp_path))] == ["step-00000001"]


def reseal(folder: Path, content: object) -> None:
    """Puts other content into a checkpoint, with a checksum that fits."""
    state, path = folder / "state.pt", folder / "checkpoint.json"
    state.write_bytes(content) if isinstance(content, bytes) else torch.save(content, state)
    facts = json.loads(path.read_text())
    del facts["sha256"]
    facts["files"] = {"state.pt": {"bytes": state.stat().st_size, "sha256": sha256(state.read_bytes()).hexdigest()}}
    path.write_text(json.dumps({**facts, "sha256": format.manifest_checksum(facts)}))


_OTHERS = {"optimizer": {}, "loss_scale": [1.0, 0], "task": {}}


@pytest.mark.parametrize(
    "content", [b"", b"text", [1], {"model": 1, **_OTHERS}, {"model": {"0.weight": 1}, **_OTHERS}, {"model": {}}]
)
def test_what_another_program_wrote_is_refused(tmp_path: Path, content: object) -> None:
    """Even with a checksum that fits."""
    model, chosen = trained()
    with saver(tmp_path) as saves:
        saves.save_now(3, state_of(model, chosen))
    folder = RunDir(tmp_path).checkpoint(3)
    reseal(folder, content)
    said: list[str] = []
    with pytest.raises(UserError, match="no checkpoint of"):
        read_newest(RunDir(tmp_path), model, said.append)
    assert "skipped" in said[0]


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


@pytest.mark.parametrize("name", RESEALED)
def test_a_checkpoint_sealed_again_with_another_state_is_passed_over(tmp_path: Path, name: str) -> None:
    """Its checksum is right; what it holds is not what this job wants, and the one before it is used."""
    model, chosen = trained(optimizer="adamw")
    with saver(tmp_path) as saves:
        saves.save_now(3, state_of(model, chosen))
    whole = torch.load(RunDir(tmp_path).checkpoint(3) / "state.pt", weights_only=True)
    damaged = RESEALED[name](whole)
    format.write(RunDir(tmp_path).checkpoint(4), state_of(model, chosen), {"step": 4, **FACTS})
    reseal(RunDir(tmp_path).checkpoint(4), damaged)
    config = load(jobs.CONFIGS / "softmax-mnist.toml", ("train.optimizer=adamw",)).config
    job = cast(Any, SimpleNamespace(task=SimpleNamespace(keeps_state=False), model=model, config=config))
    training = TrainingState(job, cast(Any, None), chosen)
    said: list[str] = []
    state, facts = read_newest(RunDir(tmp_path), model, said.append, training.misfit)
    assert facts["step"] == 3 and "step-00000004: " in said[0], said
    chosen.load(broadcast(state, Context(World()))["optimizer"])
    RunDir(tmp_path).checkpoint(3).rename(tmp_path / "gone")
    with pytest.raises(UserError, match="no checkpoint of"):
        read_newest(RunDir(tmp_path), model, said.append, training.misfit)


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    class Harm:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.touch, (tmp_path / "harm",))

    folder = tmp_path / "checkpoints" / "step-00000001"
    folder.parent.mkdir()
    format.write(
        folder, {"model": {}, "optimizer": {}, "loss_scale": [], "task": {}, "harm": Harm()}, {"step": 1, **FACTS}
    )
    with pytest.raises(UnusableCheckpoint, match=r"holds no tensors"):
        format.read(folder)
    assert not (tmp_path / "harm").exists()


def test_no_checkpoint_at_all_is_a_beginning_and_none_that_is_good_an_error(tmp_path: Path) -> None:
    model, chosen = trained()
    assert read_newest(RunDir(tmp_path), model, print) == ({}, {})
    with saver(tmp_path) as saves:
        saves.save_now(3, state_of(model, chosen))
    (RunDir(tmp_path).checkpoint(3) / "checkpoint.json").write_text("[]")
    with pytest.raises(UserError, match="no checkpoint of"):
        read_newest(RunDir(tmp_path), model, print)
