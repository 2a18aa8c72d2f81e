"""Writes the weights of a run's checkpoint into one file that other programs read."""

import json
import os
import secrets
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO, Any, Literal, cast

import h5py
import torch

from hpc_train import __version__
from hpc_train.core import rundir
from hpc_train.core.config import load
from hpc_train.core.errors import UserError, not_written
from hpc_train.core.paths import exists
from hpc_train.core.settings import Config
from hpc_train.core.world import World
from hpc_train.train import models
from hpc_train.train.comm.context import Context
from hpc_train.train.data.files import open_files
from hpc_train.train.models.gpt2_names import EMBEDDING, HEAD
from hpc_train.train.models.transformer import GPT_2
from hpc_train.train.weights_file import DTYPE_NAMES, MODEL, AsGpt2, Kind, WeightsFile, open_run

Names = Literal["ours", "gpt2"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SUFFIXES = (".safetensors", ".h5", ".pt")


@dataclass(frozen=True)
class Form:
    """What is written. names None: GPT-2's for a GPT, else ours. step None: the newest good checkpoint. dtype, a key
    of `DTYPES`, of floating-point tensors; None: as they are. force: overwrites."""

    names: Names | None = None
    step: int | None = None
    dtype: str | None = None
    force: bool = False


def export(path: Path, out: Path, form: Form, overrides: tuple[str, ...] = ()) -> list[str]:
    """Writes the weights of the newest run at or below `path` to `out`; returns what was done, in lines.

    The suffix of `out` decides the format. Under GPT-2's names, config.json is written beside a .safetensors file.
    overrides: of the run's configuration, such as data.file=... if the data, which say how many tokens there are,
    have moved. Needs no MPI. Raises UserError.
    """
    if out.suffix not in SUFFIXES:
        raise UserError(f"{out}: the format of '{out.suffix}' is unknown", f"Known: {', '.join(SUFFIXES)}.")
    if out.suffix == ".h5" and form.dtype == "bf16":
        raise UserError("--dtype bf16 is no type of HDF5", "Say fp32 or fp16, or name a .safetensors file.")
    if exists(out) and not form.force:
        raise UserError(f"{out} exists", "Name another file, or overwrite it: --force")
    run = max(rundir.find([path]), key=lambda run: run.path.name)
    config = load(run.config, overrides).config
    is_gpt = config.task.kind == "language" and config.task.model == "gpt"
    names = form.names or ("gpt2" if is_gpt else "ours")
    if names == "gpt2" and not is_gpt:
        raise UserError(
            f"--names gpt2: {run.path} trains task.kind = '{config.task.kind}', task.model = '{config.task.model}'",
            "Only task.model = 'gpt' has these names: say --names ours.",
        )
    lines: list[str] = []
    with open_run(run, form.step, lines.append) as checkpoint:
        lines += [f"{name} is no tensor: left out" for name in checkpoint.left_out]
        weights: WeightsFile = checkpoint
        settings: dict[str, Any] = {}
        if names == "gpt2":
            settings = _gpt2_settings(config, checkpoint.names())
            weights = AsGpt2(checkpoint, settings["vocab_size"])
        facts = {"format": "pt", "hpc_train": __version__, "run": str(run.path), "step": str(checkpoint.step)}
        converted = _Converted(weights, DTYPES[form.dtype] if form.dtype else None)
        with _written_whole(out, converted) as partial:
            _WRITERS[out.suffix](partial, converted, facts)
            if settings and out.suffix == ".safetensors":
                dtype = converted.names()[EMBEDDING].dtype
                _write_settings(
                    out.with_name("config.json"), settings | {"dtype": str(dtype).removeprefix("torch.")}, form
                )
                lines.append(f"{out.with_name('config.json')}: for GPT2LMHeadModel.from_pretrained('{out.parent}')")
        num_tensors, num_values = len(converted.names()), sum(prod(kind.shape) for kind in converted.names().values())
        return [*lines, f"{out}: step {checkpoint.step} of {run.path}, {num_tensors} tensors, {num_values:,} values"]


class _Converted:
    """Weights whose floating-point tensors have another type."""

    def __init__(self, weights: WeightsFile, dtype: torch.dtype | None) -> None:
        self.source, self._weights, self._dtype = weights.source, weights, dtype

    def names(self) -> dict[str, Kind]:
        return {name: Kind(kind.shape, self._to(kind.dtype)) for name, kind in self._weights.names().items()}

    def read(self, name: str) -> torch.Tensor:
        """Raises UserError if a value is too large for the type."""
        tensor = self._weights.read(name)
        converted = tensor.to(self._to(tensor.dtype)).contiguous()
        if converted.dtype != tensor.dtype and not torch.isfinite(converted).all():
            dtype = str(converted.dtype).removeprefix("torch.")
            raise UserError(f"--dtype: {name} holds values that {dtype} cannot hold", "Say fp32 or bf16.")
        return converted

    def num_bytes(self) -> int:
        return sum(prod(kind.shape) * kind.dtype.itemsize for kind in self.names().values())

    def _to(self, dtype: torch.dtype) -> torch.dtype:
        return self._dtype if self._dtype and dtype.is_floating_point else dtype


@contextmanager
def _written_whole(out: Path, weights: _Converted) -> Iterator[Path]:
    """A temporary name beside `out`, which becomes `out` at the end of the block.

    Raises UserError if the disk refuses.
    """
    partial = out.with_name(f".{out.name}.{secrets.token_hex(4)}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        rundir.sync(partial)
        os.replace(partial, out)
        rundir.sync(out.parent)
    except OSError as error:
        raise not_written(out, error, weights.num_bytes()) from None
    finally:
        with suppress(OSError):
            partial.unlink()


# ------------------------------------------------------------------------------------------------ formats


def _write_safetensors(path: Path, weights: _Converted, facts: dict[str, str]) -> None:
    """The library's own writer wants every tensor at once; this one holds a single tensor.

    Format: the header's length in 8 bytes, little-endian; the header in JSON, padded with spaces to a multiple of 8;
    the tensors without gaps, wider types first so that each is aligned.
    """
    kinds = dict(sorted(weights.names().items(), key=lambda each: (-each[1].dtype.itemsize, each[0])))
    header: dict[str, Any] = {"__metadata__": facts}
    end = 0
    for name, (shape, dtype) in kinds.items():
        begin, end = end, end + prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("xb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in kinds:
            file.write(weights.read(name).reshape(-1).view(torch.uint8).numpy().data)


_HDF5_OVERHEAD_BYTES = 2048  # of a data set, besides its values


def _write_hdf5(path: Path, weights: _Converted, facts: dict[str, str]) -> None:
    # HDF5 crashes the process, later, if the disk refuses a write: the space must be there before it begins.
    with path.open("xb") as file:
        os.posix_fallocate(file.fileno(), 0, weights.num_bytes() + _HDF5_OVERHEAD_BYTES * (1 + len(weights.names())))
    path.unlink()
    with h5py.File(path, "x") as file:
        file.attrs.update(facts)
        group = file.create_group(MODEL, track_order=True)
        for name in weights.names():
            group[name] = weights.read(name).numpy()


def _write_torch(path: Path, weights: _Converted, facts: dict[str, str]) -> None:
    """A state_dict for `load_state_dict`; torch.save takes all of it at once."""
    state = {name: weights.read(name) for name in weights.names()}
    if EMBEDDING in state:
        state[HEAD] = state[EMBEDDING]  # one storage: it is written once
    with path.open("xb") as file:
        opened = _Opened(file)
        try:
            torch.save(state, cast(IO[bytes], opened))
        except RuntimeError:  # torch hides the OSError of the file that it writes to
            if opened.error is None:
                raise
            raise opened.error from None


class _Opened:
    """A file for torch.save that keeps the error it met."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self._file.flush()


_WRITERS = {".safetensors": _write_safetensors, ".h5": _write_hdf5, ".pt": _write_torch}


# ------------------------------------------------------------------------------------------------ GPT-2


def _gpt2_settings(config: Config, kinds: dict[str, Kind]) -> dict[str, Any]:
    """What transformers' GPT2Config needs to make this model. Raises UserError if the vocabulary's size is unknown."""
    options, rows = config.task.options, kinds["tokens.weight"].shape[0]
    dropout = float(cast(float, options.get("dropout", 0.0)))
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": _vocab_size(config) if options.get("vocab_multiple", 1) != 1 else rows,
        "n_positions": kinds["positions.weight"].shape[0],
        "n_embd": kinds["tokens.weight"].shape[1],
        "n_layer": sum(name.endswith(".wide.weight") for name in kinds),
        "n_head": options.get("heads", models.default(models.CAUSAL, "gpt", "heads")),
        "activation_function": "gelu_new",  # the tanh form
        "layer_norm_epsilon": GPT_2.epsilon,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout),
        "tie_word_embeddings": True,
        # transformers' defaults are OpenAI's tokens, which another vocabulary has not.
        "bos_token_id": None,
        "eos_token_id": None,
    }


def _vocab_size(config: Config) -> int:
    """How many tokens the data have, without the rows that `vocab_multiple` adds."""
    stated = config.task.options.get("vocab_size")
    if stated is None:
        stated = open_files(config, Context(World())).tokenizer_attributes.get("vocab_size")
    if stated is None:
        raise UserError(
            f"data.file = '{config.data.file}' does not say how many different tokens it has",
            "Name the file that the run trained on: --set data.file=...",
        )
    return int(cast(int, stated))


def _write_settings(path: Path, settings: dict[str, Any], form: Form) -> None:
    text = json.dumps(settings, indent=2) + "\n"
    if exists(path) and not form.force and path.read_bytes() != text.encode():
        raise UserError(f"{path} exists, of another model", "Export to another folder, or overwrite it: --force")
    rundir.write_atomic(path, text)
