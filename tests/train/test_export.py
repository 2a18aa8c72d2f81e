"""Weights leave a run for other programs, and begin another run, to the bit."""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn
from torch.nn import functional

from hpc_train.core.config import load
from hpc_train.core.errors import UserError
from hpc_train.core.rundir import RunDir, find
from hpc_train.core.world import World
from hpc_train.train.comm.context import Context
from hpc_train.train.export import Form, export
from hpc_train.train.initial_from import check_weights, load_parts, load_weights
from hpc_train.train.loop import train
from hpc_train.train.models.gpt import Gpt
from hpc_train.train.models.mlp import Mlp
from hpc_train.train.reduce.block_weights import BlockShards, BlockWeights
from hpc_train.train.reduce.shard_blocks import find_blocks, parameters_of
from hpc_train.train.run.checkpoint.writing import write
from hpc_train.train.weights_file import open_run, open_weights
from tests import jobs
from tests.checkpoints import as_format_2

ALONE = Context(World())
VOCAB, CONTEXT, HEADS = 50, 16, 2
OPTIONS = {"layers": 2, "heads": HEADS, "width": 16, "context": CONTEXT, "vocab_multiple": 32}
JOB = """
name = "gpt"
[data]
file = "{file}"
[task]
kind = "language"
model = "gpt"
options = {{ layers = 2, heads = 2, width = 16, context = 16, vocab_multiple = 32 }}
[train]
steps = 4
global_batch = 4
optimizer = "adamw"
lr = 0.01
[reduce]
strategy = "local"
[checkpoint]
every_steps = 2
[run]
root = "{root}"
progress = "plain"
"""


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpt")
    with h5py.File(folder / "tokens.h5", "w") as file:
        rng = np.random.default_rng(0)
        file["train/inputs"] = rng.integers(0, VOCAB, 2000).astype(np.uint8)
        file.attrs["vocab_size"] = VOCAB
    (folder / "job.toml").write_text(JOB.format(file=folder / "tokens.h5", root=folder / "runs"))
    return folder / "job.toml"


def trained(job: Path, *overrides: str) -> RunDir:
    before = set(job.parent.glob("runs/*/*"))
    assert train(load(job, overrides), ALONE) == 0
    (new,) = set(job.parent.glob("runs/*/*")) - before
    return RunDir(new)


@pytest.fixture(scope="module")
def run(job: Path) -> RunDir:
    return trained(job)


@pytest.fixture(scope="module")
def weights(run: RunDir) -> dict[str, torch.Tensor]:
    """Of the newest checkpoint, under our names."""
    with open_run(run) as checkpoint:
        return {name: checkpoint.read(name) for name in checkpoint.names()}


def gpt(weights: dict[str, torch.Tensor]) -> Gpt:
    model = Gpt(VOCAB, **OPTIONS)
    model.load_state_dict(weights)
    return model.eval()


def equal(here: dict[str, torch.Tensor], there: dict[str, torch.Tensor]) -> bool:
    return here.keys() == there.keys() and all(
        here[name].dtype == there[name].dtype and torch.equal(here[name], there[name]) for name in here
    )


def loaded(path: Path) -> dict[str, torch.Tensor]:
    """As somebody without this program reads it."""
    if path.suffix == ".safetensors":
        return safetensors.torch.load_file(path)
    if path.suffix == ".pt":
        return torch.load(path, weights_only=True)
    with h5py.File(path) as file:
        return {name: torch.from_numpy(data[()]) for name, data in file["model"].items()}


# ------------------------------------------------------------------------------------------------ export


@pytest.mark.parametrize("suffix", [".safetensors", ".h5", ".pt"])
def test_the_bits_are_those_of_the_checkpoint(
    run: RunDir, weights: dict[str, torch.Tensor], suffix: str, tmp_path: Path
) -> None:
    out = tmp_path / "new" / f"model{suffix}"
    lines = export(run.path, out, Form(names="ours"))
    assert lines[-1].startswith(f"{out}: step 4 of {run.path}, {len(weights)} tensors, ")
    assert equal(loaded(out), weights) and os.listdir(out.parent) == [out.name]


def test_a_header_says_where_the_weights_come_from(run: RunDir, tmp_path: Path) -> None:
    export(run.path, tmp_path / "a.safetensors", Form("ours", step=2))
    with safetensors.safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata() | {"hpc_train": ""} == {
            "format": "pt", "step": "2", "run": str(run.path), "hpc_train": ""
        }  # fmt: skip
    export(run.path, tmp_path / "a.h5", Form("ours", step=2))
    with h5py.File(tmp_path / "a.h5") as file:
        assert file.attrs["step"] == "2" and file.attrs["run"] == str(run.path)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_floating_point_is_rounded_as_torch_does(
    run: RunDir, weights: dict[str, torch.Tensor], dtype: str, tmp_path: Path
) -> None:
    export(run.path, tmp_path / "a.safetensors", Form("ours", dtype=dtype))
    to = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    assert equal(loaded(tmp_path / "a.safetensors"), {name: each.to(to) for name, each in weights.items()})


def reference(weights: dict[str, torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
    """The logits of OpenAI's GPT-2 with these weights, written out after its published code (model.py)."""

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + 1e-5)
        return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def conv1d(x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def heads(x: torch.Tensor) -> torch.Tensor:
        return x.view(*x.shape[:2], HEADS, -1).transpose(1, 2)

    def gelu(x: torch.Tensor) -> torch.Tensor:
        return 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))

    length = tokens.shape[1]
    x = weights["transformer.wte.weight"][tokens] + weights["transformer.wpe.weight"][:length]
    for block in range(OPTIONS["layers"]):
        name = f"transformer.h.{block}"
        query, key, value = map(heads, conv1d(norm(x, f"{name}.ln_1"), f"{name}.attn.c_attn").chunk(3, -1))
        scores = query @ key.transpose(-1, -2) / key.shape[-1] ** 0.5
        scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -1e10)
        seen = (torch.softmax(scores, -1) @ value).transpose(1, 2).flatten(2)
        x = x + conv1d(seen, f"{name}.attn.c_proj")
        x = x + conv1d(gelu(conv1d(norm(x, f"{name}.ln_2"), f"{name}.mlp.c_fc")), f"{name}.mlp.c_proj")
    return norm(x, "transformer.ln_f") @ weights["transformer.wte.weight"].T


def test_a_gpt_is_a_gpt2(run: RunDir, weights: dict[str, torch.Tensor], tmp_path: Path) -> None:
    export(run.path, tmp_path / "model.safetensors", Form())
    theirs = loaded(tmp_path / "model.safetensors")
    assert len(theirs["transformer.wte.weight"]) == VOCAB < len(weights["tokens.weight"]), "no padded rows"
    tokens = torch.randint(VOCAB, (3, CONTEXT), generator=torch.Generator().manual_seed(1))
    ours = gpt(weights)(tokens)[..., :VOCAB]
    assert (reference(theirs, tokens) - ours).abs().max() < 1e-5
    settings = json.loads((tmp_path / "config.json").read_text())
    assert settings["model_type"] == "gpt2" and settings["vocab_size"] == VOCAB and settings["n_head"] == HEADS
    assert settings["n_layer"] == 2 and settings["n_embd"] == 16 and settings["n_positions"] == CONTEXT
    export(run.path, tmp_path / "a.pt", Form())
    assert equal(loaded(tmp_path / "a.pt"), theirs | {"lm_head.weight": theirs["transformer.wte.weight"]})


def test_transformers_loads_it(run: RunDir, weights: dict[str, torch.Tensor], tmp_path: Path) -> None:
    import transformers  # here: it loads half of its dependencies

    export(run.path, tmp_path / "model.safetensors", Form())
    export(run.path, tmp_path / "a.pt", Form())
    model, told = transformers.GPT2LMHeadModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(told.values()), told
    tokens = torch.randint(VOCAB, (3, CONTEXT), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours = gpt(weights)(tokens)[..., :VOCAB]
        assert (model.eval()(tokens).logits - ours).abs().max() < 1e-5
        model.load_state_dict(torch.load(tmp_path / "a.pt", weights_only=True))  # strict
    model.save_pretrained(tmp_path / "theirs")
    back = Gpt(VOCAB, **OPTIONS)
    load_weights(back, str(tmp_path / "theirs" / "model.safetensors"))
    with torch.no_grad():
        assert torch.equal(back.eval()(tokens)[..., :VOCAB], ours)


def test_other_models_keep_their_names(tmp_path: Path) -> None:
    model = Mlp((4,), 3)
    run = tmp_path / "runs/mlp/20260101T000000Z-np1"
    (run / "timings").mkdir(parents=True)
    (run / "meta.json").write_text("{}")
    (run / "config.toml").write_text(
        'name = "mlp"\n[task]\nmodel = "mlp"\n[data]\nfile = "x"\n[train]\nsteps=1\nglobal_batch=1'
    )
    with pytest.raises(UserError, match="has no checkpoint"):
        export(tmp_path / "runs", tmp_path / "a.pt", Form())
    with pytest.raises(UserError, match=r"--names gpt2: .* task.model = 'mlp'"):
        export(tmp_path / "runs", tmp_path / "a.pt", Form(names="gpt2"))
    assert model is not None and not (tmp_path / "a.pt").exists()


def test_what_cannot_be_exported_is_refused(run: RunDir, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"the format of '\.onnx' is unknown"):
        export(run.path, tmp_path / "a.onnx", Form())
    with pytest.raises(UserError, match=r"no checkpoint of step 3\n.*steps 2, 4"):
        export(run.path, tmp_path / "a.pt", Form(step=3))
    with pytest.raises(UserError, match="bf16 is no type of HDF5"):
        export(run.path, tmp_path / "a.h5", Form(dtype="bf16"))
    with pytest.raises(UserError, match=r"/nowhere\.h5' does not exist"):
        export(run.path, tmp_path / "a.pt", Form(), ("data.file=/nowhere.h5",))
    (tmp_path / "a.pt").write_text("mine")
    with pytest.raises(UserError, match=r"a\.pt exists\n.*--force"):
        export(run.path, tmp_path / "a.pt", Form())
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"config\.json exists, of another model"):
        export(run.path, tmp_path / "model.safetensors", Form())
    assert sorted(os.listdir(tmp_path)) == ["a.pt", "config.json"] and (tmp_path / "a.pt").read_text() == "mine"
    export(run.path, tmp_path / "a.pt", Form(force=True))
    assert "lm_head.weight" in loaded(tmp_path / "a.pt")


@pytest.mark.parametrize("suffix", [".safetensors", ".h5", ".pt"])
def test_a_disk_that_refuses_leaves_nothing(run: RunDir, suffix: str, tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(UserError, match=r"model\.\w+ could not be written: .* are needed"):
            export(run.path, tmp_path / f"model{suffix}", Form("ours"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(tmp_path) == []


def test_a_damaged_checkpoint_is_passed_over_and_named(job: Path, tmp_path: Path) -> None:
    assert train(load(job, (f"run.root={tmp_path / 'runs'}",)), ALONE) == 0
    (run,) = find([tmp_path / "runs"])
    newest = run.path / "checkpoints" / "step-00000004.h5"
    content = bytearray(newest.read_bytes())
    with h5py.File(newest) as file:
        content[file["model/blocks.1.wide.weight"].id.get_offset() + 9] ^= 1
    newest.write_bytes(content)
    damage = r"model/blocks\.1\.wide\.weight is damaged in bytes"
    lines = export(run.path, tmp_path / "a.safetensors", Form())
    assert re.search(damage, lines[0]) and "step 2 of" in lines[-1]
    with pytest.raises(UserError, match=damage):
        export(run.path, tmp_path / "b.safetensors", Form(step=4))
    for path in (newest, shutil.copy(newest, tmp_path / "copy.h5")):
        with pytest.raises(UserError, match=rf"train\.init_from = .*{damage}"):
            load_weights(Gpt(VOCAB, **OPTIONS), str(path))
    load_weights(Gpt(VOCAB, **OPTIONS), str(run.path / "checkpoints" / "step-00000002.h5"))


def test_checkpoints_of_earlier_versions_are_exported(
    run: RunDir, weights: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    shutil.copytree(run.path, tmp_path / "run")
    as_format_2(tmp_path / "run" / "checkpoints" / "step-00000004.h5")
    assert "step 4 of" in export(tmp_path / "run", tmp_path / "a.safetensors", Form("ours"))[-1]
    assert equal(loaded(tmp_path / "a.safetensors"), weights)


# Stops the export in the middle of its file by a signal to itself, once half the tensors are read.
STOPPED = """
import os, signal, sys
from pathlib import Path
from hpc_train.train import weights_file
from hpc_train.train.export import Form, export
read, count = weights_file.CheckpointWeights.read, 0
def stopping(self, name):
    global count
    count += 1
    if count == 10:
        os.kill(os.getpid(), getattr(signal, sys.argv[3]))
    return read(self, name)
weights_file.CheckpointWeights.read = stopping
export(Path(sys.argv[1]), Path(sys.argv[2]), Form("ours", force=True))
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGKILL"])
def test_a_stopped_export_leaves_what_was_there(run: RunDir, name: str, tmp_path: Path) -> None:
    out = tmp_path / "model.safetensors"
    out.write_text("the file of before")
    words = [sys.executable, "-c", STOPPED, str(run.path), str(out), name]
    done = subprocess.run(words, cwd=jobs.ROOT, env=jobs.environment(), capture_output=True, timeout=60)
    assert done.returncode == -getattr(signal, name), done.stderr
    assert out.read_text() == "the file of before"
    hidden = [each for each in os.listdir(tmp_path) if each != out.name]
    assert hidden == [] if name == "SIGINT" else all(each.startswith(".") for each in hidden)


def test_the_command(run: RunDir, tmp_path: Path) -> None:
    done = jobs.run(0, "export", run.path.parent, "gpt2/model.safetensors", "--dtype", "bf16", cwd=tmp_path)
    assert done.code == 0 and f"step 4 of {find([run.path.parent])[-1].path}" in done.out, done.err
    assert json.loads((tmp_path / "gpt2/config.json").read_text())["dtype"] == "bfloat16"
    again = jobs.run(0, "export", run.path, "gpt2/model.safetensors", cwd=tmp_path)
    assert again.code == 2 and again.err == (
        "hpc-train: gpt2/model.safetensors exists\n  Name another file, or overwrite it: --force\n"
    )


# ------------------------------------------------------------------------------------------------ train.init_from


@pytest.mark.parametrize("form", ["ours.safetensors", "gpt2.safetensors", "ours.h5", "gpt2.h5", "run"])
def test_a_model_begins_with_exactly_these_weights(
    run: RunDir, weights: dict[str, torch.Tensor], form: str, tmp_path: Path
) -> None:
    path = run.path if form == "run" else tmp_path / form
    if form != "run":
        export(run.path, path, Form("gpt2" if form.startswith("gpt2") else "ours"))
    model = Gpt(VOCAB, **OPTIONS)
    load_weights(model, str(path))
    found = {name: each[:VOCAB] if name == "tokens.weight" else each for name, each in model.state_dict().items()}
    assert equal(found, weights | {"tokens.weight": weights["tokens.weight"][:VOCAB]})
    added, there = model.tokens.weight[VOCAB:], weights["tokens.weight"]
    if "gpt2" not in form:
        assert torch.equal(added, there[VOCAB:])
    else:
        assert torch.allclose(added, there[:VOCAB].mean(0).expand_as(added), atol=1e-7)


@pytest.mark.parametrize("form", ["ours.safetensors", "gpt2.safetensors", "ours.h5", "gpt2.h5", "run"])
@pytest.mark.parametrize("num_shards", [2, 7])
def test_ranks_read_their_parts_of_these_weights(run: RunDir, form: str, num_shards: int, tmp_path: Path) -> None:
    """Together they are what one process reads. Seven shards cut rows, and leave out whole tensors."""
    path = run.path if form == "run" else tmp_path / form
    if form != "run":
        export(run.path, path, Form("gpt2" if form.startswith("gpt2") else "ours"))
    expected = Gpt(VOCAB, **OPTIONS)
    load_weights(expected, str(path))
    state = expected.state_dict()
    parts: dict[str, list[torch.Tensor]] = {}
    for shard in range(num_shards):
        model = Gpt(VOCAB, **OPTIONS)
        groups = parameters_of(model, find_blocks(model, None))
        shards = BlockShards([BlockWeights(block, group, num_shards, shard) for block, group in groups.items()])
        _, step = check_weights(model, str(path))
        load_parts(model, shards, str(path), step)
        for block in shards.blocks:
            for name in block.parameters:
                parts.setdefault(name, []).append(block.segment(block.own, name))
    assert equal({name: torch.cat(each).view(state[name].shape) for name, each in parts.items()}, state)


@pytest.mark.parametrize("form, most", [("other.h5", 0.26), ("checkpoint.h5", 0.4)])
def test_a_rank_reads_no_more_than_its_part(form: str, most: float, tmp_path: Path) -> None:
    """Of a checkpoint, the pieces of 4 MiB that its part lies in."""

    def read_bytes() -> int:
        return int(Path("/proc/self/io").read_text().split()[1])

    def model() -> nn.Module:
        return nn.Sequential(nn.Linear(1024, 4096), nn.Linear(4096, 1024))

    state, path = model().state_dict(), tmp_path / form
    if form == "checkpoint.h5":
        write(path, {"model": state, "optimizer": {}, "loss_scale": [1.0, 0, 0], "task": {}}, {"step": 1})
    else:
        with h5py.File(path, "w") as file:
            for name, each in state.items():
                file[f"model/{name}"] = each.numpy()
    num_bytes = path.stat().st_size
    for shard in range(4):
        here = model()
        shards = BlockShards([BlockWeights("", dict(here.named_parameters()), 4, shard)])
        before = read_bytes()
        load_parts(here, shards, str(path), None)
        assert 0.24 < (read_bytes() - before) / num_bytes < most
        for name, parameter in shards.blocks[0].parameters.items():
            begin, end = shards.blocks[0].span(name)
            assert parameter.shape == state[name].shape
            assert torch.equal(shards.blocks[0].segment(shards.blocks[0].own, name), state[name].view(-1)[begin:end])


def test_added_tokens_take_little_of_the_probability(run: RunDir, tmp_path: Path) -> None:
    """Even where all logits of a trained model are far below 0, as those of OpenAI's GPT-2 are."""
    export(run.path, tmp_path / "a.safetensors", Form())
    theirs = loaded(tmp_path / "a.safetensors")
    direction = torch.ones(16)
    theirs |= {"transformer.ln_f.bias": 4 * direction, "transformer.wte.weight": theirs["transformer.wte.weight"] - 1}
    safetensors.torch.save_file(theirs, tmp_path / "b.safetensors")
    model = Gpt(VOCAB, **OPTIONS)
    load_weights(model, str(tmp_path / "b.safetensors"))
    tokens = torch.randint(VOCAB, (3, CONTEXT), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = model.eval()(tokens)
    assert logits.max() < -30
    num_added = logits.shape[-1] - VOCAB
    assert torch.softmax(logits, -1)[..., VOCAB:].sum(-1).max() <= num_added / (VOCAB + num_added) + 1e-6


def test_files_of_the_body_alone_and_old_masks_are_read(run: RunDir, tmp_path: Path) -> None:
    """As OpenAI's own weights are published: without "transformer.", and with the causal masks."""
    export(run.path, tmp_path / "a.safetensors", Form())
    theirs = {name.removeprefix("transformer."): each for name, each in loaded(tmp_path / "a.safetensors").items()}
    masks = {f"h.{block}.attn.bias": torch.ones(1, 1, CONTEXT, CONTEXT).tril() for block in range(2)}
    safetensors.torch.save_file(theirs | masks, tmp_path / "b.safetensors")
    one, other = Gpt(VOCAB, **OPTIONS), Gpt(VOCAB, **OPTIONS)
    other.load_state_dict(one.state_dict())
    load_weights(one, str(tmp_path / "a.safetensors"))
    load_weights(other, str(tmp_path / "b.safetensors"))
    assert equal(one.state_dict(), other.state_dict())
    head = {"lm_head.weight": torch.zeros(VOCAB, 16)}
    safetensors.torch.save_file(theirs | head, tmp_path / "c.safetensors")
    with pytest.raises(UserError, match=r"lm_head\.weight differs from the embedding"):
        load_weights(other, str(tmp_path / "c.safetensors"))


def test_all_that_does_not_fit_is_named_at_once(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    state = {name: each.clone() for name, each in model.state_dict().items()}
    path = tmp_path / "a.safetensors"
    del state["0.bias"]
    state |= {"0.weight": torch.zeros(3, 4), "2.weight": torch.zeros(1), "1.num_batches_tracked": torch.tensor(0.5)}
    safetensors.torch.save_file(state, path)
    before = {name: each.clone() for name, each in model.state_dict().items()}
    with pytest.raises(UserError) as refused:
        load_weights(model, str(path))
    assert refused.value.what.splitlines() == [
        f"train.init_from = '{path}' is of another model:",
        "    missing: 0.bias",
        "    unexpected: 2.weight",
        "    differing: 0.weight is [3, 4] there and [3, 2] here, 1.num_batches_tracked is float32 there and int64 here",  # noqa: E501
    ]
    assert equal(model.state_dict(), before)
    safetensors.torch.save_file(
        {name: each.to(torch.float64) if each.ndim else each for name, each in before.items()}, path
    )
    load_weights(model, str(path))
    assert equal(model.state_dict(), before), "converted to the model's own type"


def test_hdf5_files_of_others_are_read(tmp_path: Path) -> None:
    """Without a group `model`; 16-bit numbers that HDF5 has no type for are stored as integers, with their type."""
    model = nn.Linear(3, 2)
    rounded = {name: each.bfloat16() for name, each in model.state_dict().items()}
    with h5py.File(tmp_path / "a.h5", "w") as file:
        for name, each in rounded.items():
            file[name] = each.view(torch.uint16).numpy()
            file[name].attrs["dtype"] = "bfloat16"
    load_weights(model, str(tmp_path / "a.h5"))
    assert equal(model.state_dict(), {name: each.float() for name, each in rounded.items()})
    with h5py.File(tmp_path / "a.h5", "a") as file:
        file["names"] = ["a", "b"]
    with pytest.raises(UserError, match=r"a\.h5: names is of type object, no tensor"):
        load_weights(model, str(tmp_path / "a.h5"))


@pytest.mark.parametrize("suffix", [".safetensors", ".h5"])
def test_what_is_no_file_of_weights_is_refused(run: RunDir, suffix: str, tmp_path: Path) -> None:
    model, path = Gpt(VOCAB, **OPTIONS), tmp_path / f"a{suffix}"
    with pytest.raises(UserError, match=rf"train\.init_from = '.*a{suffix}' does not exist"):
        load_weights(model, str(path))
    with pytest.raises(UserError, match="is no run directory"):
        load_weights(model, str(tmp_path))
    export(run.path, path, Form("ours"))
    whole = path.read_bytes()
    for damaged in (b"", whole[:100], whole[: len(whole) // 2], bytes(len(whole))):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="this one cannot be read"), open_weights(path, "this one") as file:
            for name in file.names():
                file.read(name)
    path.rename(tmp_path / "a.bin")
    with pytest.raises(UserError, match=r"a\.bin' is no file of weights"):
        load_weights(model, str(tmp_path / "a.bin"))


def test_a_mistake_before_the_first_step_leaves_no_run_directory(job: Path) -> None:
    root = job.parent / "unbegun"
    with pytest.raises(UserError, match=r"train\.init_from = '/nowhere' does not exist"):
        train(load(job, ("train.init_from=/nowhere", f"run.root={root}")), ALONE)
    assert [path.relative_to(root).parts[1:] for path in root.rglob("*")] == [()]  # the folder of the job's runs alone


def test_a_run_goes_on_where_another_ended(job: Path, run: RunDir, weights: dict[str, torch.Tensor]) -> None:
    """Its first loss is that of the other run's weights; resuming it reads its own checkpoint, not the file."""
    out = job.parent / "begin.safetensors"
    export(run.path, out, Form())
    second = trained(job, f"train.init_from={out}", "seed=7", "checkpoint.every_steps=1", "train.steps=1")
    tokens = h5py.File(job.parent / "tokens.h5")["train/inputs"][()]
    windows = torch.from_numpy(np.stack([tokens[at : at + CONTEXT + 1] for at in first_rows(second)])).long()
    embedding = weights["tokens.weight"].clone()
    embedding[VOCAB:] = embedding[:VOCAB].mean(0)
    logits = gpt(weights | {"tokens.weight": embedding})(windows[:, :-1])
    expected = functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()).item()
    assert float(second.metrics.read_text().splitlines()[1].split(",")[1]) == pytest.approx(expected, abs=1e-5)
    out.unlink()
    keys = (f"train.init_from={out}", "seed=7", "train.steps=3")
    assert train(load(job, keys), ALONE, str(second.path)) == 0
    assert len(second.metrics.read_text().splitlines()) == 1 + 3
    with pytest.raises(UserError, match=r"train\.init_from = None here"):
        train(load(job, keys[1:]), ALONE, str(second.path))


def first_rows(run: RunDir) -> list[int]:
    """Where the windows of the first step begin in the tokens."""
    from hpc_train.core.sampling import BatchSampler, Shares
    from hpc_train.train.tasks.language import Language

    config = load(run.config).config
    task = Language(config, ALONE)
    rows = BatchSampler(task.order, 4, config.seed, Shares(1), 0).batch(0).rows
    return [int(row) * CONTEXT for row in rows]
