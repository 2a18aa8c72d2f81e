"""The whole configuration as typed values: TOML in, TOML out, every error names the key."""

import difflib
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from hpc_train.errors import UserError

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]
Count = Annotated[int, Field(ge=1, le=10**12)]
Whole = Annotated[int, Field(ge=0)]
Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
Text = Annotated[str, Field(pattern=r"^[^\x00-\x1f]+$")]
Option = bool | int | float | str | list[int] | list[float] | list[str]


_READ_DATA = ("classification", "language", "masked_language")
_ONE_OF = {"train.global_batch": "batch_per_rank", "train.batch_per_rank": "global_batch"}


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Data(_Section):
    file: Text | None = None  # required where the task reads data
    inputs: Text = "train/inputs"  # data sets inside the file
    targets: Text = "train/targets"
    test_inputs: Text = "test/inputs"  # absent from the file: no test accuracy
    test_targets: Text = "test/targets"


class Task(_Section):
    kind: str = "classification"  # or "mypackage.mytask:MyTask"
    model: str = "softmax"
    num_classes: Annotated[int, Field(ge=1, le=10**8)] | None = None  # one more than the largest label
    options: dict[str, Option] = {}  # passed to the model as keyword arguments


class Train(_Section):
    steps: Count
    global_batch: Count | None = None  # strong scaling: the same work on any number of ranks
    batch_per_rank: Count | None = None  # weak scaling: work grows with the ranks
    accumulate: Count = 1  # parts of a rank's share, one after the other, whose gradients are reduced once
    optimizer: Literal["sgd", "adamw", "lars", "lamb"] = "sgd"
    lr: Rate = 0.1
    lr_reference_batch: Count | None = None  # the global batch that lr is meant for: lr grows with the batch
    lr_warmup_steps: Whole = 0  # lr rises to its value over these steps: from 0, or from lr for its reference batch
    schedule: Literal["constant", "linear", "cosine", "step"] = "constant"  # of lr after that, to 0 at the last step
    lr_milestones: list[Fraction] = [1 / 3, 2 / 3, 8 / 9]  # parts of all steps after which "step" lowers lr
    lr_decay: Fraction = 0.1  # by this factor
    momentum: Fraction = 0.0  # of sgd and lars
    betas: list[Fraction] = [0.9, 0.999]  # of adamw and lamb
    weight_decay: Amount = 0.0  # of matrices and kernels; biases, norms and other vectors have none
    clip_norm: Amount = 0.0  # the longest gradient of the whole model; 0: any
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"  # of matrix products (autocast); weights stay fp32
    activation_checkpointing: bool = False  # compute blocks again in backward, to hold fewer activations
    compile: bool = False  # torch.compile
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: the GPU of the local rank where there is one
    timing: Literal["steps", "phases"] = "steps"  # on a GPU, phases are timed by waiting for it, which costs overlap
    peak_tflops: Rate | None = None  # of a rank's device, for MFU; known for common GPUs
    log_every: Count = 100
    warmup_steps: Whole = 10  # marked in the timings, left out of speedups
    threads: Annotated[int, Field(ge=0, le=4096)] = 0  # of torch, per rank; 0: the cores this rank may use
    on_nonfinite: Literal["stop", "skip"] = "stop"  # a loss of NaN or infinity: stop, or leave the step's update out
    check_weights_every: Whole = 0  # steps between comparisons of all ranks' weights; 0: never

    @model_validator(mode="after")
    def _one_batch_key(self) -> Self:
        if (self.global_batch is None) == (self.batch_per_rank is None):
            raise ValueError("set exactly one of train.global_batch (strong scaling) and train.batch_per_rank (weak)")
        return self

    def batch_size(self, size: int) -> int:
        """The global batch on `size` ranks that train."""
        return self.global_batch or (self.batch_per_rank or 0) * size


class Rl(_Section):
    """Of the kinds `policy_gradient` and `dqn`."""

    environment: Text = "CartPole-v1"  # of gymnasium: discrete actions, observations in a vector
    max_episode_steps: Count | None = None  # of an episode; not set: the environment's own limit
    gamma: Fraction = 0.99  # what a reward one action later is worth
    test_episodes: Count = 100
    baseline_weight: Amount = 0.5  # policy_gradient: of the baseline's loss
    entropy_weight: Amount = 0.0  # policy_gradient: against early certainty
    num_envs: Count = 16  # dqn: of all ranks together
    actions_per_step: Count = 1  # dqn: of each environment, before each update
    multi_step: Count = 3  # dqn: actions whose rewards are counted before the target network's estimate
    replay_size: Count = 50_000  # dqn: transitions kept
    replay_start: Count = 1000  # dqn: of them by random actions, before the first update
    target_every: Count = 100  # dqn: steps between copies into the target network
    epsilon_end: Annotated[float, Field(ge=0, le=1)] = 0.05  # dqn: share of random actions
    epsilon_steps: Count = 1000  # dqn: steps in which that share falls from 1 to its end
    double: bool = True  # dqn: the online network chooses the action that the target network values


class Reduce(_Section):
    strategy: Literal["horovod", "mpi", "parameter_server", "sharded", "local"] = "horovod"
    compression: Literal["none", "fp16", "bf16"] = "none"  # of gradients on their way; they are summed in fp32
    # Of Horovod, under the names of horovodrun's options.
    cycle_time_ms: Rate = 0.1  # HOROVOD_CYCLE_TIME; its own default of 1 ms paces small models
    fusion_threshold_mb: Amount = 0.0  # 0: the same buckets in every run, and so the same bits
    autotune: bool = False
    autotune_log_file: Text | None = None
    hierarchical_allreduce: bool = False  # within nodes, then between them; of Horovod with NCCL
    adasum: bool = False  # combine gradients by Adasum instead of adding them; ranks: a power of two
    # Of the parameter server.
    servers: Count = 1  # the last ranks of the job: each holds its part of the weights, and trains on nothing
    asynchronous: bool = False  # each worker's gradients update the weights as they come

    def num_workers(self, size: int) -> int:
        """How many of `size` ranks train."""
        return size - self.servers if self.strategy == "parameter_server" else size


class Checkpoint(_Section):
    every_steps: Whole = 0  # 0: by time alone
    every_minutes: Amount = 10.0  # 0: by steps alone
    keep: Annotated[int, Field(ge=0, le=1000)] = 2  # the newest ones; 0: none is written


class Energy(_Section):
    sample_hz: Annotated[float, Field(ge=0.01, le=100, allow_inf_nan=False)] = 1.0
    watts_per_core: Rate = 10.0  # assumption of the estimate where no meter can be read


class Run(_Section):
    root: Text = "runs"
    progress: Literal["auto", "bar", "plain"] = "auto"
    # A rank this late ends the job; 0: never. Later than Slurm's own 300 s, after which it requeues a job whose node is
    # gone: a job that ended by itself before that has failed, and does not come back.
    stall_s: Amount = 600.0


class Config(_Section):
    """A job. Immutable; made by `load`, written by `dumps`."""

    name: Name
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    data: Data = Data()
    task: Task = Task()
    train: Train
    rl: Rl = Rl()
    reduce: Reduce = Reduce()
    checkpoint: Checkpoint = Checkpoint()
    energy: Energy = Energy()
    run: Run = Run()

    def global_batch(self, size: int) -> int:
        """Samples of a step in a job of `size` ranks, servers included."""
        return self.train.batch_size(self.reduce.num_workers(size))

    @model_validator(mode="after")
    def _data_where_it_is_read(self) -> Self:
        if self.data.file is None and self.task.kind in _READ_DATA:
            raise ValueError("data.file is required and not set")
        return self

    @model_validator(mode="after")
    def _keys_that_exclude_each_other(self) -> Self:
        train, reduce = self.train, self.reduce
        is_server, in_parts = reduce.strategy == "parameter_server", reduce.strategy in ("parameter_server", "sharded")
        strategy = f"reduce.strategy = '{reduce.strategy}'"
        faults = {
            f"train.optimizer = '{train.optimizer}' needs whole layers, which {strategy} cuts": in_parts
            and train.optimizer in ("lars", "lamb"),
            f"train.precision = 'fp16' does not go with {strategy}: use bf16": is_server and train.precision == "fp16",
            f"train.check_weights_every does not go with {strategy}: only servers hold weights": is_server
            and train.check_weights_every,
            "train.clip_norm does not go with reduce.asynchronous: no gradient is whole": is_server
            and reduce.asynchronous
            and train.clip_norm,
            f"reduce.compression does not go with {strategy}": in_parts and reduce.compression != "none",
            f"reduce.adasum does not go with {strategy}: it is Horovod's": reduce.adasum
            and reduce.strategy != "horovod",
            "reduce.adasum does not go with reduce.compression": reduce.adasum and reduce.compression != "none",
            "train.betas takes two numbers": len(train.betas) != 2,
        }
        for words, is_so in faults.items():
            if is_so:
                raise ValueError(words)
        return self


@dataclass(frozen=True)
class Loaded:
    """A configuration and, for each dotted key, where its value came from: "default", "file" or "--set"."""

    config: Config
    origin: dict[str, str]


def load(path: Path, overrides: tuple[str, ...] = ()) -> Loaded:
    """Defaults, then the TOML file, then `key=value` overrides. Raises `UserError` naming the key."""
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist", "Name a TOML job file; configs/ holds examples.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}", "Name a TOML job file.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not TOML: {error}", "See configs/softmax-mnist.toml for the form.") from None
    origin = dict.fromkeys(flatten(tree), f"file {path.name}")
    for override in overrides:
        key, value = _parse_override(override)
        if key in _ONE_OF:  # the file's choice between them is overridden, too
            tree.get("train", {}).pop(_ONE_OF[key], None)
        _set(tree, key, value)
        under = flatten(value, f"{key}.") if isinstance(value, dict) and key != "task.options" else {key: value}
        origin.update(dict.fromkeys(under, "--set"))
        if key.startswith("task.options."):
            origin["task.options"] = "--set"
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        raise UserError(*_explain(error, path, origin)) from None
    return Loaded(config, {key: origin.get(key, "default") for key in _known_keys()})


def as_dict(config: Config) -> dict[str, Any]:
    """The configuration as nested plain values, unset keys left out (TOML has no null)."""
    return config.model_dump(exclude_none=True)


def comparable(config: Config) -> dict[str, Any]:
    """The dotted keys that decide how long a step takes and what it computes: runs are compared where these agree."""
    told_apart = {"name", "train.log_every", "train.steps", "train.peak_tflops", "reduce.autotune_log_file"}
    return {
        key: value
        for key, value in flatten(as_dict(config)).items()
        if key not in told_apart and not key.startswith(("run.", "energy.", "checkpoint."))
    }


def same_job(one: Config | None, other: Config) -> bool:
    """Whether two configurations ask for the same training. The data may lie elsewhere, in a job's scratch, say."""

    def asked(config: Config) -> dict[str, Any]:
        file = Path(config.data.file or "").name
        return comparable(config) | {"name": config.name, "train.steps": config.train.steps, "data.file": file}

    return one is not None and asked(one) == asked(other)


def trajectory(config: Config) -> dict[str, Any]:
    """The dotted keys that a run cannot change half-way: what it trains on, in which order, and what it trains.

    The global batch is one of them, too; it depends on the number of ranks, and each checkpoint states it.
    """
    fixed = ("seed", "data.inputs", "data.targets", "task.", "train.optimizer", "rl.")
    return {key: value for key, value in flatten(as_dict(config)).items() if key.startswith(fixed)}


def dumps(loaded: Loaded) -> str:
    """The resolved configuration as TOML that `load` reads back, each key with where its value came from."""
    tree = loaded.config.model_dump()
    lines = [_line(key, tree[key], loaded.origin[key]) for key in tree if not isinstance(tree[key], dict)]
    for section, values in tree.items():
        if isinstance(values, dict):
            lines += ["", f"[{section}]"]
            lines += [_line(key, value, loaded.origin[f"{section}.{key}"]) for key, value in values.items()]
    return "\n".join(lines) + "\n"


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"train": {"lr": 0.5}} -> {"train.lr": 0.5}. A model's options stay one value."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        nested = isinstance(value, dict) and prefix + key != "task.options"
        flat.update(flatten(value, f"{prefix}{key}.") if nested else {prefix + key: value})
    return flat


def _line(key: str, value: Any, origin: str) -> str:
    if value is None:
        return f"# {key} =".ljust(40) + "  # not set"
    return f"{key} = {_inline(value)}".ljust(40) + f"  # {origin}"


def _inline(value: Any) -> str:
    """A TOML value in one line; tomli_w breaks arrays into several."""
    if isinstance(value, list):
        return f"[{', '.join(_inline(item) for item in value)}]"
    if isinstance(value, dict):
        return (
            f"{{{', '.join(tomli_w.dumps({k: 0}).partition(' =')[0] + ' = ' + _inline(v) for k, v in value.items())}}}"
        )
    return tomli_w.dumps({"value": value}).removeprefix("value = ").rstrip("\n")


def _parse_override(override: str) -> tuple[str, Any]:
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not key:
        raise UserError(f"--set {override}: no key=value", "Write --set train.steps=200")
    if _wants_text(key):
        return key, text
    try:
        return key, tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        pass
    try:
        return key, float(text)  # .5 and 5. are no TOML, and no mystery on a command line either
    except ValueError:
        return key, text


def _wants_text(key: str) -> bool:
    """Whether the key's type is text, so that `--set name=123` is a name and not a number."""
    model: Any = Config
    for part in key.split("."):
        field = getattr(model, "model_fields", {}).get(part)
        if field is None:
            return False
        model = field.annotation
    # Annotated text too: pydantic keeps its constraints apart, but for those inside `Text | None`.
    return model is str or model == Text | None


def _set(tree: dict[str, Any], key: str, value: Any) -> None:
    *sections, last = key.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise UserError(f"--set {key}: {section} is a value, not a section", "See hpc-train config show CONFIG.")
    tree[last] = value


def _explain(error: ValidationError, path: Path, origin: dict[str, str]) -> tuple[str, str]:
    """(what, remedy): one line a wrong key."""
    lines = []
    for fault in error.errors(include_url=False):
        if fault["type"] == "extra_forbidden":
            key = ".".join(str(part) for part in fault["loc"])
            near = difflib.get_close_matches(key, _known_keys(), n=1, cutoff=0.5)
            lines.append(
                f"{_source(key, path, origin)}: unknown key {key}" + (f"; did you mean {near[0]}?" if near else "")
            )
            continue
        key = _dotted(fault["loc"])
        if fault["type"] == "missing":
            lines.append(f"{path.name}: {key} is required and not set")
        elif fault["type"] == "value_error":
            lines.append(f"{path.name}: {fault['ctx']['error']}")
        else:
            words = f"should be a table [{key}]" if fault["type"] == "model_type" else _lower_first(fault["msg"])
            lines.append(f"{_source(key, path, origin)}: {key} = {fault['input']!r}: {words}")
    return "\n".join(dict.fromkeys(lines)), "hpc-train config show CONFIG prints every key that a job file has."


def _source(key: str, path: Path, origin: dict[str, str]) -> str:
    return origin.get(key, f"file {path.name}")


def _lower_first(text: str) -> str:
    return text[:1].lower() + text[1:]


def _dotted(location: tuple[int | str, ...]) -> str:
    """The key of a fault; pydantic adds the branch of a union, which is no part of the key."""
    known = _known_keys()
    for end in range(len(location), 0, -1):
        key = ".".join(str(part) for part in location[:end])
        if key in known:
            return key
    return ".".join(str(part) for part in location)


def _known_keys(model: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    keys = []
    for name, field in model.model_fields.items():
        kind = field.annotation
        keys.append(prefix + name)
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            keys += _known_keys(kind, f"{prefix}{name}.")
    return keys
