"""`train.init_from`: a new run begins with the weights of a file or of another run."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import nn

from hpc_train.core.errors import UserError
from hpc_train.core.paths import expanded
from hpc_train.train.models import gpt2_names
from hpc_train.train.models.gpt import Gpt
from hpc_train.train.reduce.block_weights import BlockShards
from hpc_train.train.reduce.reducer import Reducer
from hpc_train.train.run.attempt import Attempt, log
from hpc_train.train.run.checkpoint.retention import checkpoints
from hpc_train.train.setup import Job
from hpc_train.train.weights_file import FromGpt2, Kind, WeightsFile, open_weights

_MOST_NAMED = 5  # tensors of a kind in a message


def begin_from(job: Job, attempt: Attempt) -> None:
    """Collective. Loads `train.init_from`, unless a checkpoint is resumed, before the reducer sends the root's weights.

    Not if `Job.draw`: see `begin_parts_from`.
    """
    init_from = job.config.train.init_from
    if init_from is not None and not job.draw:
        job.context.on_root(partial(_begin_whole, job.model, init_from, attempt))


def begin_parts_from(job: Job, reducer: Reducer, attempt: Attempt) -> None:
    """Collective. The same for weights that the reducer has divided: every rank reads its own parts of the file."""
    init_from, shards = job.config.train.init_from, reducer.shards
    if init_from is None or not job.draw or job.context.on_root(partial(_resumes, attempt)):
        return
    assert isinstance(shards, BlockShards)
    source, step = job.context.on_root(partial(check_weights, job.model, init_from))
    job.context.on_all(partial(load_parts, job.model, shards, init_from, step))
    reducer.sync_weights(True)  # stage 2 computes with whole weights
    job.context.on_root(partial(log, f"Weights of {source}"))


def _begin_whole(model: nn.Module, init_from: str, attempt: Attempt) -> None:
    if not _resumes(attempt):
        log(f"Weights of {load_weights(model, init_from)}")


def _resumes(attempt: Attempt) -> bool:
    return bool(attempt.source and checkpoints(attempt.source))


def load_weights(model: nn.Module, init_from: str) -> str:
    """Overwrites the model's parameters and buffers with those of `init_from`; returns where they came from, in words.

    Floating-point numbers are converted to the model's type. Raises UserError if tensors are missing, unexpected or of
    another shape, before it changes the model.
    """
    with _open_fitting(model, init_from) as weights:
        _load_whole(model, weights, _targets(model).keys())
        return weights.source


def check_weights(model: nn.Module, init_from: str) -> tuple[str, int | None]:
    """What `load_weights` raises and returns, and the step of a checkpoint. No tensor is loaded."""
    with _open_fitting(model, init_from) as weights:
        return weights.source, weights.step


def load_parts(model: nn.Module, shards: BlockShards, init_from: str, step: int | None) -> None:
    """`load_weights` for a rank that keeps parts of the weights: it reads those alone.

    step: of the checkpoint, of a run that goes on meanwhile. Verifies what it reads: `check_weights` has read all.
    """
    with _open_fitting(model, init_from, step, verifies=False) as weights:
        kinds, targets = weights.names(), _targets(model)
        name_of = {id(each): name for block in shards.blocks for name, each in block.parameters.items()}
        tied = dict(model.named_parameters(remove_duplicate=False))
        _load_whole(model, weights, [name for name in targets if id(tied.get(name)) not in name_of])
        for block in shards.blocks:
            for name, parameter in block.parameters.items():
                begin, end = block.span(name)
                if begin < end:
                    found = _part if kinds[name].shape == parameter.shape else _part_of_padded
                    block.segment(block.own, name).copy_(found(weights, name, parameter, begin, end))


def _part(weights: WeightsFile, name: str, parameter: torch.Tensor, begin: int, end: int) -> torch.Tensor:
    """The numbers [begin, end) of a parameter: its rows are read in which they lie."""
    if parameter.ndim == 0:
        return weights.read(name).reshape(1)
    num_of_row = parameter.shape[1:].numel()
    first, last = begin // num_of_row, -(-end // num_of_row)
    rows = weights.read(name, (slice(first, last),)).reshape(-1)
    return rows[begin - first * num_of_row : end - first * num_of_row]


def _part_of_padded(weights: WeightsFile, name: str, parameter: torch.Tensor, begin: int, end: int) -> torch.Tensor:
    """The same of a parameter that has more rows than the file: their mean takes all of them."""
    padded = torch.empty(parameter.shape, dtype=parameter.dtype)
    _fill_padded(padded, weights.read(name))
    return padded.view(-1)[begin:end]


def _load_whole(model: nn.Module, weights: WeightsFile, names: Iterable[str]) -> None:
    targets = _targets(model)
    for name in names:
        found, target = weights.read(name), targets[name]
        with torch.no_grad():
            if found.shape == target.shape:
                target.copy_(found)
            else:
                _fill_padded(target, found)


def _targets(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}


@contextmanager
def _open_fitting(
    model: nn.Module, init_from: str, step: int | None = None, verifies: bool = True
) -> Iterator[WeightsFile]:
    """The file, whose tensors are those of the model. Raises UserError if they are not."""
    key = f"train.init_from = '{init_from}'"
    with open_weights(expanded(Path(init_from)), key, step, verifies) as found:
        weights: WeightsFile = (
            FromGpt2(found) if isinstance(model, Gpt) and gpt2_names.is_gpt2(found.names()) else found
        )
        if faults := _faults(weights.names(), _targets(model), _padded_rows(model)):
            raise UserError(
                f"{key} is of another model:\n    " + "\n    ".join(faults),
                "Set task.model and task.options as they were there, or name weights of this model.",
            )
        yield weights


def _padded_rows(model: nn.Module) -> dict[str, int]:
    """The tensors that may have more rows than the file's, and how many rows the file's then have."""
    return {"tokens.weight": model.vocab_size} if isinstance(model, Gpt) else {}


def _fill_padded(target: torch.Tensor, rows: torch.Tensor) -> None:
    """Gives the embedding's added rows the mean of the others.

    The logit of such a token is then the mean logit, so that (Jensen's inequality) k of them beside V take at most
    k / (V + k) of the probability. Rows drawn anew would have logits near 0, where those of a trained model may all
    be near -50: the added tokens would get all of it.
    """
    target[: len(rows)].copy_(rows)
    target[len(rows) :] = rows.double().mean(0).to(target.dtype)


def _faults(kinds: dict[str, Kind], targets: dict[str, torch.Tensor], padded: dict[str, int]) -> list[str]:
    """Every tensor that does not fit, in words."""
    differing = []
    for name in kinds.keys() & targets.keys():
        (shape, dtype), target = kinds[name], targets[name]
        fitting = {tuple(target.shape), (padded.get(name, len(target) if target.ndim else 0), *target.shape[1:])}
        if shape not in fitting:
            differing.append(f"{name} is {list(shape)} there and {list(target.shape)} here")
        elif dtype != target.dtype and not (dtype.is_floating_point and target.is_floating_point()):
            differing.append(f"{name} is {dtype} there and {target.dtype} here".replace("torch.", ""))
    groups = {
        "missing": sorted(targets.keys() - kinds.keys()),
        "unexpected": sorted(kinds.keys() - targets.keys()),
        "differing": sorted(differing),
    }
    return [f"{title}: {_some(names)}" for title, names in groups.items() if names]


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return ", ".join(names[:_MOST_NAMED]) + more
