"""Which samples measure a model: those that it has not trained on, unless the user names others."""

from dataclasses import replace
from functools import partial
from typing import NamedTuple

from hpc_train.core.errors import UserError
from hpc_train.core.paths import same_file
from hpc_train.core.rundir import RunDir
from hpc_train.core.settings import Config
from hpc_train.train.comm.context import Context, joint
from hpc_train.train.data.files import open_files
from hpc_train.train.data.hdf5_faults import data_paths
from hpc_train.train.data.samples import held_out_rows
from hpc_train.train.inference.samples import Samples


class Choice(NamedTuple):
    """Data sets to measure. file: None for that of the run. is_held_out: of these, those that data.hold_out kept."""

    file: str | None
    inputs: str
    targets: str
    is_held_out: bool = False


def choose_unseen(run: RunDir, config: Config, context: Context) -> Choice:
    """Collective. The samples to test on, else those to validate on. Raises UserError if the run has neither."""
    data = config.data
    test = Choice(data.test_file, str(data.test_inputs), data.test_targets)
    if data.test_file or _has(config, test.inputs, context):
        return test
    if data.hold_out:
        return Choice(None, str(data.inputs), data.targets, True)
    validation = Choice(data.validation_file, str(data.validation_inputs), data.validation_targets)
    if data.validation_file or _has(config, validation.inputs, context):
        return validation
    raise joint(
        UserError(
            f"{run.path} has no samples to measure that it did not train on: {data.file} holds no {test.inputs}",
            f"Name a file: --data FILE; or measure the samples that it trained on: --inputs {data.inputs}",
        )
    )


def _has(config: Config, name: str, context: Context) -> bool:
    return bool(context.on_all(lambda: open_files(config, context).has(name)))


def held_out_of(samples: Samples, config: Config, context: Context) -> Samples:
    """Collective. Those of the training samples that data.hold_out kept."""
    return replace(samples, split=samples.split.select(held_out_rows(config, context)), are_held_out=True)


def role_in_training(samples: Samples, config: Config, context: Context) -> str:
    """Collective. "held out", "trained on", or "" for samples that training did not see."""
    if samples.are_held_out:
        return "held out"
    return "trained on" if context.on_root(partial(_were_trained_on, samples, config)) else ""


def _were_trained_on(samples: Samples, config: Config) -> bool:
    if config.data.file is None or samples.name != config.data.inputs:
        return False
    trained_on = data_paths(config)
    return any(same_file(path, other) for path in samples.files.paths for other in trained_on)
