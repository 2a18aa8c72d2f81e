"""The keys of a job file with their types and defaults, one class for each section.

configs/README.md explains every key; `key_rules.py` says which keys go together.
"""

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]
Count = Annotated[int, Field(ge=1, le=10**12)]
Whole = Annotated[int, Field(ge=0)]
Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
Text = Annotated[str, Field(pattern=r"^[^\x00-\x1f]+$")]
IMPORT_PATTERN = r"^[A-Za-z_][\w.]*:[A-Za-z_][\w.]*$"
ImportPath = Annotated[str, Field(pattern=IMPORT_PATTERN)]  # "package.module:name"
Option = bool | int | float | str | list[int] | list[float] | list[str]

RECORDED = "recorded"  # task.kind of a run whose training loop is another program: see train/recording.py
UNKNOWN_STEPS = 10**12  # train.steps of such a run until its loop has ended, and of a job with train.epochs


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Data(_Section):
    file: Text | None = None  # required by tasks that read data; the files of a pattern are one data set
    dataset: ImportPath | None = None  # class of torch.utils.data.Dataset, or a function that returns one: not file
    options: dict[str, Option] = {}  # its keyword arguments
    test_options: dict[str, Option] = {}  # those of the samples to test on, besides options; {}: no test
    validation_options: dict[str, Option] = {}  # of those to validate on
    threads: Annotated[int, Field(ge=0, le=1024)] = 0  # that read its items; 0: the rank's cores, at most 8
    inputs: Text | list[Text] = "train/inputs"  # data set in the file; a list of several for your own task
    targets: Text = "train/targets"
    test_inputs: Text | list[Text] = "test/inputs"  # data set in the file; if it is missing, there is no test
    test_targets: Text = "test/targets"
    test_file: Text | None = None  # where these data sets are; default: data.file
    offsets: Text | None = None  # document starts and the end, in tokens; then no window spans two
    test_offsets: Text | None = None
    hold_out: Annotated[float, Field(ge=0, le=0.5)] = 0.0  # share of the training samples to validate on
    hold_out_by: Text | None = None  # data set with a group for each sample: a group is held out whole, or not at all
    validation_inputs: Text | list[Text] = "validation/inputs"  # to validate on in place of data.hold_out
    validation_targets: Text = "validation/targets"
    validation_offsets: Text | None = None
    validation_file: Text | None = None  # where these data sets are; default: data.file
    # Values that the file declares as missing (_FillValue, missing_value), and NaN: drop leaves their samples out.
    missing: Literal["refuse", "drop", "mean"] = "refuse"
    # scale_factor: as the file's attributes say; standardize: mean 0, deviation 1 over the training samples.
    normalize: Literal["none", "scale_factor", "standardize"] = "scale_factor"
    # collective: all ranks read slabs together and exchange their samples; memory: each rank holds a part of the data
    # and ranks exchange samples; auto: memory map or decoded chunks, or memory if the data exceed every node's memory.
    read: Literal["auto", "collective", "memory"] = "auto"
    memory_mb: Count = 512  # memory per rank for decoded chunks, samples received at once, or items of a Dataset
    shuffle_chunks: Whole = 0  # chunks whose samples are mixed; 0: as many as a third of memory_mb holds, at most 64

    @property
    def in_words(self) -> str:
        """The key that names the data, for a message."""
        return f"data.file = '{self.file}'" if self.dataset is None else f"data.dataset = '{self.dataset}'"


class Task(_Section):
    kind: str = "classification"  # or "mypackage.mytask:MyTask"
    model: str = "softmax"  # or "package.module:factory"
    loss: Literal["mse", "mae", "huber"] = "mse"  # of regression
    num_classes: Annotated[int, Field(ge=1, le=10**8)] | None = None  # default: one more than the largest label
    options: dict[str, Option] = {}  # keyword arguments of the model: see its docstring
    metrics: list[Text] = []  # beside loss and accuracy: "top5", "f1", "confusion", or "package.module:metric"


class Train(_Section):
    steps: Count = UNKNOWN_STEPS  # this or epochs, of which the number of samples makes steps: `with_num_steps`
    epochs: Rate | None = None
    stop_after: Whole = 0  # validations in a row that are no better, after which training ends; 0: never
    init_from: Text | None = None  # weights that a new run begins with: .safetensors, .h5 or a run directory
    freeze: list[Text] = []  # weights that stay as they begin, as patterns of their names: "layers.0.*"
    rates: dict[str, Rate] = {}  # what lr is multiplied by, by patterns of weights' names; the last that fits counts
    global_batch: Count | None = None  # samples per step on any number of ranks (strong scaling)
    batch_per_rank: Count | None = None  # samples per step and rank (weak scaling)
    accumulate: Count = 1  # micro-batches per step and rank; their gradients are reduced once
    optimizer: Literal["sgd", "adamw", "lars", "lamb"] | ImportPath = "sgd"
    optimizer_options: dict[str, Option] = {}  # keyword arguments of an optimizer of another package
    lr: Rate = 0.1
    lr_reference_batch: Count | None = None  # global batch for which lr is set; the rate scales with the global batch
    lr_warmup_steps: Whole = 0  # steps over which the rate rises: from 0, or from lr with lr_reference_batch
    schedule: Literal["constant", "linear", "cosine", "step"] | ImportPath = (
        "constant"  # after the warm-up; to 0 at the last step
    )
    lr_milestones: list[Fraction] = [1 / 3, 2 / 3, 8 / 9]  # fractions of all steps after which step lowers the rate
    lr_decay: Fraction = 0.1  # factor by which step lowers the rate
    momentum: Fraction = 0.0  # for sgd and lars
    betas: Annotated[list[Fraction], Field(min_length=2, max_length=2)] = [0.9, 0.999]  # for adamw and lamb
    weight_decay: Amount = 0.0  # for matrices and kernels; biases, norms and other vectors have none
    clip_norm: Amount = 0.0  # maximum global gradient norm; 0 disables clipping
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"  # of matrix products (autocast); weights stay in FP32
    activation_checkpointing: bool = False  # recompute blocks in the backward pass to save memory
    compile: bool = False  # use torch.compile
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: the GPU of the local rank if there is one; cpu, cuda
    timing: Literal["steps", "phases"] = "steps"  # on a GPU, timing phases synchronises, which costs overlap
    peak_tflops: Rate | None = None  # peak of a rank's device, for MFU; known for common GPUs
    log_every: Count = 100
    warmup_steps: Whole = 10  # first steps, which speedups exclude
    threads: Annotated[int, Field(ge=0, le=4096)] = 0  # torch threads per rank; 0: the cores that this rank may use
    on_nonfinite: Literal["stop", "skip"] = "stop"  # if a loss or gradient is NaN or infinite: stop, or skip the update
    check_weights_every: Whole = 0  # steps between comparisons of all ranks' weights; 0: never

    def batch_size(self, size: int) -> int:
        """The global batch of `size` ranks that train."""
        return self.global_batch or (self.batch_per_rank or 0) * size


class Rl(_Section):
    """Keys of the tasks `policy_gradient` and `dqn`."""

    environment: Text = "CartPole-v1"  # gymnasium environment with discrete actions and vector observations
    max_episode_steps: Count | None = None  # default: the environment's own limit
    gamma: Fraction = 0.99  # discount factor per action
    test_episodes: Count = 100
    baseline_weight: Amount = 0.5  # policy_gradient: weight of the baseline's loss
    entropy_weight: Amount = 0.0  # policy_gradient: weight of the entropy bonus
    num_envs: Count = 16  # dqn: number of environments of all ranks together
    actions_per_step: Count = 1  # dqn: actions in each environment before each update
    multi_step: Count = 3  # dqn: rewards that are summed before the target network's estimate (n-step return)
    replay_size: Count = 50_000  # dqn: transitions in the replay buffer
    replay_start: Count = 1000  # dqn: transitions collected with random actions before the first update
    target_every: Count = 100  # dqn: steps between updates of the target network
    epsilon_end: Annotated[float, Field(ge=0, le=1)] = 0.05  # dqn: final probability of a random action
    epsilon_steps: Count = 1000  # dqn: steps over which that probability falls from 1
    double: bool = True  # dqn: the online network chooses the action that the target network evaluates (double DQN)


class Reduce(_Section):
    strategy: Literal["horovod", "mpi", "torch", "parameter_server", "sharded", "local", "own"] = (
        "horovod"  # own: a recorded loop's
    )
    compression: Literal["none", "fp16", "bf16"] = "none"  # of gradients in messages; accumulated in FP32
    # Of the strategy sharded.
    stage: Literal[1, 2, 3] = 1  # what each rank keeps 1/N of: 1 the optimizer's state, 2 gradients too, 3 weights too
    shard_within: Literal["job", "node"] | Count = "job"  # ranks that share one copy: all, a node's, or so many
    shard_blocks: list[Text] | None = None  # modules whose weights are gathered together, as patterns: "encoder.*"
    transport: Literal["auto", "mpi", "horovod", "torch"] = "auto"  # auto: horovod on GPUs, mpi on CPUs
    # Horovod's, named after horovodrun's options.
    cycle_time_ms: Rate = 0.1  # HOROVOD_CYCLE_TIME; Horovod's default of 1 ms limits small models
    fusion_threshold_mb: Amount = 0.0  # 0: the same buckets in every run, and so the same bits
    autotune: bool = False
    autotune_log_file: Text | None = None
    hierarchical_allreduce: bool = False  # within nodes, then between them; Horovod with NCCL only
    adasum: bool = False  # combine gradients by Adasum; the number of ranks must be a power of two
    # The parameter server's.
    servers: Count = 1  # parameter_server: number of servers, the last ranks; they hold the weights and do not train
    asynchronous: bool = False  # parameter_server: apply each worker's gradients as they arrive

    def num_workers(self, size: int) -> int:
        """The number of `size` ranks that train."""
        return size - self.servers if self.strategy == "parameter_server" else size


class Checkpoint(_Section):
    every_steps: Whole = 0  # steps between checkpoints; 0: by time only
    every_minutes: Amount = 10.0  # minutes between checkpoints; 0: by steps only
    keep: Annotated[int, Field(ge=0, le=1000)] = 2  # number of checkpoints to keep; 0: write none
    keep_best: Text | None = None  # such as "validation.loss": the best state is saved, and kept beside the newest
    # Each rank writes its ranges of the file from a thread while it trains on; or all together by MPI-IO, and train
    # on afterwards: for file systems that take few large writes better than many.
    write: Literal["independent", "collective"] = "independent"


class Validation(_Section):
    every_steps: Whole = 0  # steps between validations; 0: none
    every_epochs: Amount = 0.0  # epochs between validations, in place of steps; 0: none

    @property
    def is_due(self) -> bool:
        """Whether there are validations at all."""
        return bool(self.every_steps or self.every_epochs)

    @property
    def in_words(self) -> str:
        """The key that asks for them, for a message."""
        by_steps = f"validation.every_steps = {self.every_steps}"
        return f"validation.every_epochs = {self.every_epochs:g}" if self.every_epochs else by_steps


class Test(_Section):
    samples: Count | None = None  # of the test samples at most so many, the same ones in every run


class Energy(_Section):
    sample_hz: Annotated[float, Field(ge=0.01, le=100, allow_inf_nan=False)] = 1.0
    watts_per_core: Rate = 10.0  # assumed power for the estimate if no meter can be read
    # Idle power, which reports subtract from the energy of the work: measured for idle_s before training while all
    # ranks sleep, or given in watts per node.
    idle_s: Annotated[float, Field(ge=0, le=3600, allow_inf_nan=False)] = 0.0
    idle_w: Rate | None = None
    # The centre and its electricity, for the report, which assumes nothing if they are not set.
    pue: Annotated[float, Field(ge=1, le=10, allow_inf_nan=False)] | None = None  # power usage effectiveness
    co2_g_per_kwh: Amount | None = None
    price_per_kwh: Amount | None = None
    currency: Text | None = None  # currency of the price, such as "EUR"


def _stall(stall_s: float) -> float:
    if 0 < stall_s < 1:
        raise ValueError(f"run.stall_s = {stall_s}: a healthy step may take longer; set 1 or more, or 0 to disable")
    return stall_s


class Run(_Section):
    root: Text = "runs"
    progress: Literal["auto", "bar", "plain"] = "auto"
    # A rank this late ends the job; 0: never. Longer than Slurm's own 300 s, after which it requeues a job whose node
    # is down: Slurm does not requeue a job that has ended by itself.
    stall_s: Annotated[float, AfterValidator(_stall), Field(ge=0, allow_inf_nan=False)] = 600.0
    # Of rank 0's host, on which it hears of dead and late ranks on other hosts; default: the address of its host name.
    interface: Text | None = None
    check_memory: bool = True  # refuse a job whose weights, gradients and optimizer do not fit a rank


class Config(_Section):
    """A job. `core.config` reads and writes it."""

    name: Name
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    data: Data = Data()
    task: Task = Task()
    train: Train
    rl: Rl = Rl()
    reduce: Reduce = Reduce()
    validation: Validation = Validation()
    test: Test = Test()
    checkpoint: Checkpoint = Checkpoint()
    energy: Energy = Energy()
    run: Run = Run()

    def with_num_steps(self, num_steps: int) -> "Config":
        """The job with that train.steps, once it is known how many its train.epochs are."""
        return self.model_copy(update={"train": self.train.model_copy(update={"steps": num_steps})})

    def global_batch(self, size: int) -> int:
        """Samples per step in a job of `size` ranks, servers included."""
        return self.train.batch_size(self.reduce.num_workers(size))
