"""Which keys of a job file go together: every rule that needs no data, no MPI and no GPU to decide.

`broken_rules` runs when a job file is loaded, `check_ranks` when the number of ranks is known. Rules that need the data
(labels, tokens, shapes) are where the data are opened.
"""

from collections.abc import Iterator

from hpc_train.core.errors import UserError
from hpc_train.core.formatting import plural
from hpc_train.core.import_path import is_import_path
from hpc_train.core.settings import RECORDED, UNKNOWN_STEPS, Config, Data, Rl

_KINDS_WITH_DATA = ("classification", "regression", "language", "masked_language")
_KINDS_OF_ARRAYS = ("classification", "regression")
_KINDS_OF_EPISODES = ("policy_gradient", "dqn")
_KINDS_WITH_TOKENS = ("language", "masked_language")


def broken_rules(config: Config) -> list[UserError]:
    """What does not go together: each with its keys and values, and the remedy."""
    return [*_required_keys(config), *_task_keys(config), *_strategy_keys(config), *_energy_keys(config)]


def _required_keys(config: Config) -> Iterator[UserError]:
    train, data, is_recorded = config.train, config.data, config.task.kind == RECORDED
    if (train.global_batch is None) == (train.batch_per_rank is None):
        found = "neither is set" if train.global_batch is None else "both are set"
        yield UserError(
            f"exactly one of train.global_batch and train.batch_per_rank is needed, and {found}",
            "Set train.global_batch for strong scaling, or train.batch_per_rank for weak scaling.",
        )
    if (train.steps == UNKNOWN_STEPS) == (train.epochs is None) and not is_recorded:
        found = "neither is set" if train.epochs is None else "both are set"
        yield UserError(
            f"exactly one of train.steps and train.epochs is needed, and {found}",
            "Set train.steps to a number of weight updates, or train.epochs to how often each sample is trained on.",
        )
    if train.epochs is not None and config.task.kind in _KINDS_OF_EPISODES:
        yield UserError(
            f"train.epochs = {train.epochs:g}: task.kind = '{config.task.kind}' has no data set, and so no epoch",
            "Set train.steps.",
        )
    if data.file is None and data.dataset is None and config.task.kind in _KINDS_WITH_DATA:
        yield UserError("data.file is required and not set", "Set it to an HDF5 file: hpc-train prepare --help.")
    if "://" in (data.file or ""):
        yield UserError(
            f"data.file = '{data.file}' is a URL, but training reads files", "Copy it first: hpc-train stage --help."
        )
    if is_recorded != (config.reduce.strategy == "own"):
        yield UserError(
            f"task.kind = '{config.task.kind}' and reduce.strategy = '{config.reduce.strategy}': "
            f"'{RECORDED}' and 'own' need each other",
            "Leave both out, and call hpc_train.recording in your own loop.",
        )


def _task_keys(config: Config) -> Iterator[UserError]:
    train, data, rl, kind = config.train, config.data, config.rl, config.task.kind
    if kind in _KINDS_OF_ARRAYS and (isinstance(data.inputs, list) or isinstance(data.test_inputs, list)):
        yield UserError(
            f"data.inputs = {data.inputs}: the models of task.kind = '{kind}' take one data set",
            "Name one data set, or write a task of your own: configs/README.md.",
        )
    if kind in _KINDS_WITH_TOKENS and data.read != "auto":
        yield UserError(f"data.read = '{data.read}' does not go with task.kind = '{kind}'", "Leave data.read out.")
    if kind == "policy_gradient" and train.accumulate > 1:
        yield UserError(
            f"train.accumulate = {train.accumulate}: policy_gradient normalises advantages over a whole step",
            "Leave train.accumulate out.",
        )
    if kind == "regression" and config.task.num_classes is not None:
        yield UserError(
            f"task.num_classes = {config.task.num_classes} does not go with task.kind = 'regression'",
            "Leave task.num_classes out, or set task.kind to 'classification'.",
        )
    yield from _dataset_keys(config)
    yield from _validation_keys(config)
    if config.test.samples is not None and kind not in _KINDS_WITH_DATA:
        yield UserError(
            f"test.samples = {config.test.samples} does not go with task.kind = '{kind}'",
            "Set rl.test_episodes." if kind in _KINDS_OF_EPISODES else "Let its test_batches give fewer samples.",
        )
    if config.task.metrics and kind not in _KINDS_OF_ARRAYS:
        yield UserError(
            f"task.metrics = {config.task.metrics} goes with {' and '.join(_KINDS_OF_ARRAYS)}, not '{kind}'",
            "Leave task.metrics out; a task of your own gives its measures itself (Task.test).",
        )
    if kind != "regression" and config.task.loss != "mse":
        yield UserError(
            f"task.loss = '{config.task.loss}' is for task.kind = 'regression', not '{kind}'", "Leave task.loss out."
        )
    if kind == "dqn" and rl.replay_start > rl.replay_size:
        yield UserError(
            f"rl.replay_start = {rl.replay_start} is more than rl.replay_size = {rl.replay_size}: no step would begin",
            f"Set rl.replay_start to at most {rl.replay_size}.",
        )


def _dataset_keys(config: Config) -> Iterator[UserError]:
    """What goes with files alone does not go with data.dataset, nor the other way round."""
    data, usual = config.data, Data()
    own = ("options", "test_options", "validation_options", "threads")
    free = ("dataset", "hold_out", "normalize", "memory_mb", *own)
    if data.dataset is None:
        for name in (name for name in own if getattr(data, name) != getattr(usual, name)):
            yield UserError(
                f"data.{name} = {getattr(data, name)!r} needs data.dataset", "Set data.dataset, or leave it out."
            )
        return
    dataset = f"data.dataset = '{data.dataset}'"
    if config.task.kind not in _KINDS_OF_ARRAYS:
        yield UserError(
            f"{dataset} is for {' and '.join(_KINDS_OF_ARRAYS)}, not task.kind = '{config.task.kind}'",
            "Leave it out; a task of your own makes its own Dataset.",
        )
    if config.validation.is_due and not data.hold_out and not data.validation_options:
        yield UserError(
            f"{config.validation.in_words} needs samples to validate on, and {dataset} has none besides its own",
            "Set data.hold_out = 0.1, or data.validation_options to the arguments that make others.",
        )
    for name in Data.model_fields:
        if name not in free and getattr(data, name) != getattr(usual, name):
            yield UserError(
                f"data.{name} = {getattr(data, name)!r} is of HDF5 files, and does not go with {dataset}",
                "Leave one of them out.",
            )


def _validation_keys(config: Config) -> Iterator[UserError]:
    data, kind, validation = config.data, config.task.kind, config.validation
    if validation.every_steps and validation.every_epochs:
        yield UserError(
            f"validation.every_steps = {validation.every_steps} and validation.every_epochs = "
            f"{validation.every_epochs:g} are both set",
            "Leave one of them out.",
        )
    if validation.is_due and kind in _KINDS_OF_EPISODES:
        yield UserError(f"{validation.in_words}: task.kind = '{kind}' has no samples to validate on", "Leave it out.")
    if data.hold_out and kind in (*_KINDS_WITH_TOKENS, *_KINDS_OF_EPISODES):
        yield UserError(
            f"data.hold_out = {data.hold_out:g} is for {' and '.join(_KINDS_OF_ARRAYS)}, not task.kind = '{kind}'",
            "Leave it out; texts have data.validation_inputs.",
        )
    if data.hold_out_by is not None and not data.hold_out:
        yield UserError(
            f"data.hold_out_by = '{data.hold_out_by}' needs data.hold_out", "Set data.hold_out = 0.1, or leave it out."
        )
    usual = Data()
    own = ("validation_inputs", "validation_targets", "validation_offsets", "validation_file", "validation_options")
    for name in (name for name in own if getattr(data, name) != getattr(usual, name)):
        value = f"data.{name} = {getattr(data, name)!r}"
        if data.hold_out:
            yield UserError(
                f"{value} and data.hold_out = {data.hold_out:g}: both name samples to validate on",
                "Leave one of them out.",
            )
        elif not validation.is_due:
            yield UserError(
                f"{value}, and validations are not asked for", "Set validation.every_epochs = 1, or leave it out."
            )
    for key, wanted in (
        ("train.stop_after", config.train.stop_after),
        ("checkpoint.keep_best", config.checkpoint.keep_best),
    ):
        if wanted and not validation.is_due:
            yield UserError(
                f"{key} = {wanted!r} needs validation.every_steps or validation.every_epochs",
                "Set both, or leave it out.",
            )
    if validation.is_due and config.reduce.strategy == "parameter_server":
        yield UserError(
            f"{validation.in_words} does not go with reduce.strategy = 'parameter_server': its workers are not at the "
            "same step",
            "Leave it out.",
        )


def _strategy_keys(config: Config) -> Iterator[UserError]:
    train, reduce = config.train, config.reduce
    strategy = f"reduce.strategy = '{reduce.strategy}'"
    is_imported = is_import_path(train.optimizer)
    if train.optimizer_options and not is_imported:
        yield UserError(
            f"train.optimizer_options = {train.optimizer_options} is for optimizers of other packages, not "
            f"'{train.optimizer}'",
            "Leave it out: train.lr, train.momentum, train.betas and train.weight_decay are its options.",
        )
    if reduce.strategy in ("parameter_server", "sharded"):
        if train.optimizer in ("lars", "lamb") or is_imported:
            yield UserError(
                f"train.optimizer = '{train.optimizer}' {'may need' if is_imported else 'needs'} whole layers, which "
                f"{strategy} cuts",
                "Use adamw or sgd, or reduce.strategy = 'horovod' or 'mpi'.",
            )
        if reduce.compression != "none":
            yield UserError(
                f"reduce.compression = '{reduce.compression}' does not go with {strategy}", "Leave compression out."
            )
    if reduce.strategy == "parameter_server":
        if train.rates:
            yield UserError(
                f"train.rates = {train.rates} does not go with {strategy}, whose servers update many weights as one",
                "Use reduce.strategy = 'horovod', 'mpi' or 'sharded'.",
            )
        if train.precision == "fp16":
            yield UserError(f"train.precision = 'fp16' does not go with {strategy}", "Use bf16.")
        if train.check_weights_every:
            yield UserError(
                f"train.check_weights_every = {train.check_weights_every} does not go with {strategy}: only servers "
                "hold weights",
                "Leave train.check_weights_every out.",
            )
        if reduce.asynchronous and train.clip_norm:
            yield UserError(
                f"train.clip_norm = {train.clip_norm:g} does not go with reduce.asynchronous: no rank has all "
                "gradients",
                "Leave one of them out.",
            )
        if config.data.read != "auto":
            yield UserError(
                f"data.read = '{config.data.read}' does not go with {strategy}: servers read no data",
                "Leave data.read out.",
            )
    yield from _shard_keys(config)
    if reduce.adasum and reduce.strategy != "horovod":
        yield UserError(
            f"reduce.adasum = true does not go with {strategy}: only Horovod has it",
            "Set reduce.strategy to 'horovod', or leave reduce.adasum out.",
        )
    if reduce.adasum and reduce.compression != "none":
        yield UserError(
            f"reduce.adasum = true does not go with reduce.compression = '{reduce.compression}'",
            "Leave one of them out.",
        )


def _shard_keys(config: Config) -> Iterator[UserError]:
    train, reduce = config.train, config.reduce
    if reduce.strategy != "sharded":
        for key, value, default in (
            ("stage", reduce.stage, 1),
            ("shard_within", reduce.shard_within, "job"),
            ("shard_blocks", reduce.shard_blocks, None),
            ("transport", reduce.transport, "auto"),
        ):
            if value not in (default, None):
                yield UserError(
                    f"reduce.{key} = {value!r} needs reduce.strategy = 'sharded', not '{reduce.strategy}'",
                    f"Set reduce.strategy to 'sharded', or leave reduce.{key} out.",
                )
        return
    stage = f"reduce.stage = {reduce.stage}"
    if reduce.stage == 1:
        if reduce.shard_blocks:
            yield UserError(
                f"reduce.shard_blocks = {reduce.shard_blocks} does not go with {stage}",
                "Set reduce.stage to 2 or 3, or leave reduce.shard_blocks out.",
            )
        return
    if train.compile:
        yield UserError(
            f"train.compile = true does not go with {stage}, whose hooks in the model torch.compile cannot trace",
            "Set reduce.stage to 1, or leave train.compile out.",
        )
    if config.task.kind in _KINDS_OF_EPISODES:
        yield UserError(
            f"task.kind = '{config.task.kind}' does not go with {stage}: ranks play episodes of unlike length",
            "Set reduce.stage to 1.",
        )


def _energy_keys(config: Config) -> Iterator[UserError]:
    energy = config.energy
    if energy.idle_s and energy.idle_w is not None:
        yield UserError(
            f"energy.idle_s = {energy.idle_s:g} (measure) and energy.idle_w = {energy.idle_w:g} (given) are both set",
            "Leave one of them out.",
        )
    if energy.price_per_kwh is not None and energy.currency is None:
        yield UserError(
            f"energy.price_per_kwh = {energy.price_per_kwh:g} has no energy.currency", 'Set it, such as "EUR".'
        )


def check_ranks(config: Config, num_ranks: int) -> None:
    """Raises `UserError` if the job cannot train on `num_ranks` ranks."""
    train, reduce = config.train, config.reduce
    ranks = plural(num_ranks, "rank")
    if reduce.strategy == "local" and num_ranks > 1:
        raise UserError(
            f"reduce.strategy = 'local' is one process, and there are {ranks}",
            "Start one process without mpirun, or set reduce.strategy to horovod or mpi.",
        )
    num_workers = reduce.num_workers(num_ranks)
    if num_workers < 1:
        raise UserError(
            f"reduce.strategy = 'parameter_server': {ranks}, of which reduce.servers = {reduce.servers} would serve, "
            "and none train",
            f"Start {reduce.servers + 1} ranks or more, or set reduce.servers lower.",
        )
    if reduce.adasum and num_ranks & (num_ranks - 1):
        raise UserError(
            f"reduce.adasum = true, and {num_ranks} ranks are no power of two",
            "Start 2, 4, 8 ... ranks, or leave it out.",
        )
    if isinstance(reduce.shard_within, int) and num_ranks % reduce.shard_within:
        raise UserError(
            f"reduce.shard_within = {reduce.shard_within}: {ranks} cannot be divided into groups of that size",
            f"Start a multiple of {reduce.shard_within} ranks, or set it to a divisor of {num_ranks}.",
        )
    batch_size = train.batch_size(num_workers)
    if batch_size < num_workers:
        raise UserError(
            f"train.global_batch = {batch_size} is smaller than the {num_workers} ranks: some would idle",
            f"Set train.global_batch to {num_workers} or more, or start fewer ranks.",
        )
    if config.task.kind == "dqn":
        _check_dqn(config.rl, batch_size, num_workers)


def _check_dqn(rl: Rl, batch_size: int, num_workers: int) -> None:
    if rl.num_envs < num_workers:
        raise UserError(
            f"rl.num_envs = {rl.num_envs} is smaller than the {num_workers} ranks: some would have none to play",
            f"Set rl.num_envs to {num_workers} or more, or start fewer ranks.",
        )
    if batch_size > rl.replay_size:
        raise UserError(
            f"rl.replay_size = {rl.replay_size} is smaller than a global batch of {batch_size}",
            f"Set rl.replay_size to {batch_size} or more, or train.global_batch lower.",
        )
