"""The first weights of every shipped job are those of its seed, to the bit, by any strategy and number of ranks."""

import hashlib
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from torch import nn

from hpc_train.core.config import Loaded, load
from hpc_train.core.errors import UserError
from hpc_train.core.world import World
from hpc_train.train.comm.context import Context
from hpc_train.train.reduce.block_weights import BlockShards
from hpc_train.train.reduce.reducer import open_reducer
from hpc_train.train.setup import Job, open_job
from hpc_train.train.tasks.classification import Classification
from tests import jobs

CONFIGS = Path(__file__).parents[2] / "configs"
TINY = "task.options = { layers = 2, heads = 2, width = 32, context = 24, vocab_size = 256, vocab_multiple = 16 }"
JOBS: dict[str, list[str]] = {
    "softmax-mnist": [],
    "mlp-mnist": [],
    "mlp-auto-mpg": ["data.normalize=scale_factor"],
    "unet-burgers": ["data.normalize=scale_factor"],
    "resnet-fashion": [],
    "vgg-fashion": [],
    "bert-text": [],
    "gpt-text": [],
    "gpt-shakespeare": [],
    "gpt2-124m": [TINY],
    "gpt2-xl": [TINY],
    "dqn-cartpole": ["rl.replay_start=60"],
    "reinforce-cartpole": [],
    "torchvision-resnet18": [],
    "timm-vit": [],
    "transformers-gpt2": [],
    "transformers-bert": [],
}
STRATEGIES = [
    ["reduce.strategy=mpi"],
    ["reduce.strategy=horovod"],
    ["reduce.strategy=parameter_server", "reduce.servers=1"],
    *(["reduce.strategy=sharded", f"reduce.stage={stage}"] for stage in (1, 2, 3)),
    *(["reduce.strategy=sharded", "reduce.shard_within=2", f"reduce.stage={stage}"] for stage in (2, 3)),
]


class NoFlags:
    stop = save = False


@pytest.fixture(scope="module")
def data(context: Context, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Pictures and text of no meaning: a model's shape is taken from them, and no step is made."""

    def write() -> dict[str, Path]:
        folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
        files = {name: folder / f"{name}.h5" for name in ("pictures", "text", "fields")}
        with h5py.File(files["pictures"], "w") as file:
            for part in ("train", "test"):
                file[f"{part}/inputs"] = rng.integers(0, 255, (600, 28, 28), np.uint8)
                file[f"{part}/targets"] = (np.arange(600) % 10).astype(np.uint8)
        with h5py.File(files["fields"], "w") as file:
            for part in ("train", "test"):
                file[f"{part}/inputs"] = file[f"{part}/targets"] = rng.random((40, 2, 32, 48), np.float32)
        with h5py.File(files["text"], "w") as file:
            for part in ("train", "test"):
                file[f"{part}/inputs"] = rng.integers(1, 255, 10_000, np.uint8)
            file.attrs.update(vocab_size=256, tokenizer="bytes")
        return files

    return context.on_root(write)


def loaded(name: str, data: dict[str, Path], *overrides: str) -> Loaded:
    is_text = "text" in name or "gpt" in name or "bert" in name
    file = data["text" if is_text else "fields" if "unet" in name else "pictures"]
    kept = (f"data.file={file}",) if "cartpole" not in name else ()
    return load(CONFIGS / f"{name}.toml", (*kept, *JOBS[name], "reduce.stage=1", *overrides))


def digest(state: dict[str, torch.Tensor]) -> str:
    whole = hashlib.sha256()
    for name in sorted(state):
        value = state[name].detach().cpu().contiguous()
        whole.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        whole.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()


def assembled(job: Job, shards: Any) -> dict[str, torch.Tensor]:
    """Collective. The model's state, put together from the parts that ranks keep."""
    state = {name: value.clone() for name, value in job.model.state_dict().items()}
    if not isinstance(shards, BlockShards):
        return state
    names = dict(job.model.named_parameters(remove_duplicate=False))
    for block in shards.blocks:
        for name, parameter in block.parameters.items():
            flat = torch.full((parameter.numel(),), torch.nan, dtype=parameter.dtype)
            for begin, end, part in job.context.all_gather((*block.span(name), block.segment(block.own, name).clone())):
                known = ~flat[begin:end].isnan()  # of another copy
                assert torch.equal(flat[begin:end][known], part[known])
                flat[begin:end] = part
            for tied in [each for each, other in names.items() if other is parameter]:
                state[tied] = flat.view(parameter.shape)
    return state


@pytest.mark.parametrize("name", JOBS)
def test_first_weights_are_those_of_the_seed(context: Context, data: dict[str, Path], name: str) -> None:
    """The reference knows nothing of ranks, so equality holds between numbers of ranks, too."""
    if why := jobs.lacking(CONFIGS / f"{name}.toml"):
        pytest.skip(why)
    with open_job(loaded(name, data, "reduce.strategy=local").config, Context(World())) as alone:
        expected = digest(alone.model.state_dict())
    for strategy in STRATEGIES if context.world.size > 1 else STRATEGIES[:2]:
        if "cartpole" in name and strategy[-1] in ("reduce.stage=2", "reduce.stage=3"):
            continue  # refused: environments are played at their own pace
        if context.world.size % 2 and "reduce.shard_within=2" in strategy:
            continue
        with (
            open_job(loaded(name, data, *strategy).config, context) as job,
            open_reducer(job.config.reduce, job.model, job.mesh, NoFlags(), job.draw) as reducer,
        ):
            assert (job.draw is not None) == (strategy[-1] in ("reduce.stage=2", "reduce.stage=3")), strategy
            found = context.all_gather(digest(assembled(job, reducer.shards)))
            assert found == [expected] * context.world.size, strategy


def test_every_shipped_job_is_among_them() -> None:
    assert set(JOBS) == {path.stem for path in CONFIGS.glob("*.toml")}


# ------------------------------------------------------------------------- constructors that cannot be taken apart


class FromSvd(Classification):
    """torch lays out the result of this operation differently on the meta device and on a CPU."""

    def model(self) -> nn.Module:
        model = nn.Sequential(nn.Flatten(), nn.Linear(784, 12), nn.Linear(12, 10))
        model[1].weight = nn.Parameter(torch.linalg.svd(torch.randn(12, 784), full_matrices=False)[2])
        return model


class ReadsValues(Classification):
    def model(self) -> nn.Module:
        model = nn.Sequential(nn.Flatten(), nn.Linear(784, 12), nn.Linear(12, 10))
        model[1].bias = nn.Parameter(torch.full((12,), model[2].weight.std().item()))
        return model


class Unseeded(Classification):
    def model(self) -> nn.Module:
        model = nn.Sequential(nn.Flatten(), nn.Linear(784, 12), nn.Linear(12, 10))
        model[1].bias = nn.Parameter(torch.tensor(np.random.default_rng().random(12), dtype=torch.float32))
        return model


def of_kind(kind: type, data: dict[str, Path], stage: int) -> Loaded:
    keys = (f"task.kind={__name__}:{kind.__name__}", "task.options={}", "reduce.strategy=sharded")
    return loaded("mlp-mnist", data, *keys, f"reduce.stage={stage}")


def test_a_model_that_needs_values_is_made_whole_and_says_so(
    context: Context, data: dict[str, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    if context.world.size == 1:
        pytest.skip("one rank shares nothing")
    found = []
    for stage in (1, 3):
        with (
            open_job(of_kind(ReadsValues, data, stage).config, context) as job,
            open_reducer(job.config.reduce, job.model, job.mesh, NoFlags(), job.draw) as reducer,
        ):
            found.append(digest(assembled(job, reducer.shards)))
    assert found[0] == found[1]
    told = capfd.readouterr().err
    said = "Every rank makes the whole model before it keeps its part: "
    assert told.count(said) == (1 if context.world.is_root else 0), told


def test_weights_that_no_rank_can_draw_alone_are_named_on_all_ranks(context: Context, data: dict[str, Path]) -> None:
    if context.world.size == 1:
        pytest.skip("one rank shares nothing")
    with (
        pytest.raises(UserError, match=r"the initial value of 1\.weight cannot be made .*\n.*stage = 1") as refused,
        open_job(of_kind(FromSvd, data, 3).config, context) as job,
        open_reducer(job.config.reduce, job.model, job.mesh, NoFlags(), job.draw),
    ):
        pass
    assert refused.value.joint
    with open_job(of_kind(FromSvd, data, 1).config, context) as job:
        assert torch.isfinite(job.model[1].weight).all()


def test_constructors_that_differ_between_ranks_are_refused(context: Context, data: dict[str, Path]) -> None:
    if context.world.size == 1:
        pytest.skip("one rank agrees with itself")
    with (
        pytest.raises(UserError, match="its constructor uses other values on rank 1 than on rank 0"),
        open_job(of_kind(Unseeded, data, 3).config, context),
    ):
        pass
