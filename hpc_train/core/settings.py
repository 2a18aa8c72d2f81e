"""What a job file may say: typed values with their defaults, one class a section."""

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]
Count = Annotated[int, Field(ge=1, le=10**12)]
Whole = Annotated[int, Field(ge=0)]
Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
Text = Annotated[str, Field(pattern=r"^[^\x00-\x1f]+$")]
Option = bool | int | float | str | list[int] | list[float] | list[str]

RECORDED = "recorded"  # task.kind of a run whose loop is another program's: see train/recording.py
UNKNOWN_STEPS = 10**12  # train.steps of such a run until its loop has ended
_READ_DATA = ("classification", "language", "masked_language")


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Data(_Section):
    file: Text | None = None  # required where the task reads data; a pattern (part-*.h5) makes its files one data set
    inputs: Text | list[Text] = "train/inputs"  # data sets inside the file; several for a task of your own
    targets: Text = "train/targets"
    test_inputs: Text | list[Text] = "test/inputs"  # absent from the file: no test accuracy
    test_targets: Text = "test/targets"
    offsets: Text | None = None  # of tokens: where each document begins, and the end; no window spans two then
    test_offsets: Text | None = None
    # collective: all ranks read each global batch together, rows that lie together; memory: each rank holds its part
    # of the data and ranks exchange samples; auto: a memory map or decoded chunks, or memory where no node has enough.
    read: Literal["auto", "collective", "memory"] = "auto"
    memory_mb: Count = 512  # of a rank: for decoded chunks, or what it is sent at once
    shuffle_chunks: Whole = 0  # chunks whose samples are mixed; 0: what 3/8 of memory_mb hold, at most 64


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
    on_nonfinite: Literal["stop", "skip"] = "stop"  # a loss or gradient of NaN or infinity: stop, or leave it out
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
    strategy: Literal["horovod", "mpi", "parameter_server", "sharded", "local", "own"] = (
        "horovod"  # own: a recorded loop's
    )
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
    # What nodes draw at rest, to be told apart from what the work adds: measured for so long before the loop, while
    # all ranks sleep, or given in watts of what a node's meters measure together.
    idle_s: Annotated[float, Field(ge=0, le=3600, allow_inf_nan=False)] = 0.0
    idle_w: Rate | None = None
    # Of the centre and its electricity, for the report; nothing is assumed where they are not set.
    pue: Annotated[float, Field(ge=1, le=10, allow_inf_nan=False)] | None = None  # power usage effectiveness
    co2_g_per_kwh: Amount | None = None
    price_per_kwh: Amount | None = None
    currency: Text | None = None  # of the price

    @model_validator(mode="after")
    def _said_once_and_whole(self) -> Self:
        if self.idle_s and self.idle_w is not None:
            raise ValueError("set one of energy.idle_s (measure) and energy.idle_w (given), not both")
        if self.price_per_kwh is not None and self.currency is None:
            raise ValueError('energy.price_per_kwh needs energy.currency, "EUR" say')
        return self


def _stall(stall_s: float) -> float:
    if 0 < stall_s < 1:
        raise ValueError(f"run.stall_s = {stall_s}: a healthy step may take longer; set 1 or more, or 0 for never")
    return stall_s


class Run(_Section):
    root: Text = "runs"
    progress: Literal["auto", "bar", "plain"] = "auto"
    # A rank this late ends the job; 0: never. Later than Slurm's own 300 s, after which it requeues a job whose node is
    # gone: a job that ended by itself before that has failed, and does not come back.
    stall_s: Annotated[float, AfterValidator(_stall), Field(ge=0, allow_inf_nan=False)] = 600.0
    # Of rank 0's host, where it hears of dead and late ranks on other hosts. Not set: where they find it by its name
    interface: Text | None = None


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
        if "://" in (self.data.file or ""):
            raise ValueError(
                f"data.file = '{self.data.file}' is a URL, and training reads files: hpc-train stage copies it here"
            )
        return self

    @model_validator(mode="after")
    def _a_recorded_loop_reduces_by_itself(self) -> Self:
        if (self.task.kind == RECORDED) != (self.reduce.strategy == "own"):
            raise ValueError(f"task.kind = '{RECORDED}' and reduce.strategy = 'own' stand together, or not at all")
        return self

    @model_validator(mode="after")
    def _keys_that_exclude_each_other(self) -> Self:
        train, reduce = self.train, self.reduce
        is_server, in_parts = reduce.strategy == "parameter_server", reduce.strategy in ("parameter_server", "sharded")
        strategy = f"reduce.strategy = '{reduce.strategy}'"
        faults = [
            (
                in_parts and train.optimizer in ("lars", "lamb"),
                f"train.optimizer = '{train.optimizer}' needs whole layers, which {strategy} cuts",
            ),
            (
                is_server and train.precision == "fp16",
                f"train.precision = 'fp16' does not go with {strategy}: use bf16",
            ),
            (
                is_server and train.check_weights_every,
                f"train.check_weights_every does not go with {strategy}: only servers hold weights",
            ),
            (
                is_server and reduce.asynchronous and train.clip_norm,
                "train.clip_norm does not go with reduce.asynchronous: no gradient is whole",
            ),
            (
                is_server and self.data.read != "auto",
                f"data.read = '{self.data.read}' does not go with {strategy}: servers read nothing",
            ),
            (in_parts and reduce.compression != "none", f"reduce.compression does not go with {strategy}"),
            (
                reduce.adasum and reduce.strategy != "horovod",
                f"reduce.adasum does not go with {strategy}: it is Horovod's",
            ),
            (reduce.adasum and reduce.compression != "none", "reduce.adasum does not go with reduce.compression"),
            (len(train.betas) != 2, "train.betas takes two numbers"),
        ]
        for is_so, words in faults:
            if is_so:
                raise ValueError(words)
        return self
