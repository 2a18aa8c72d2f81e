"""Where the samples to validate and to test on are: in the files of data.file, or in their own."""

from hpc_train.core.errors import UserError
from hpc_train.core.settings import Config
from hpc_train.train.comm.context import Context
from hpc_train.train.data.files import Files, open_files


def validation_files(config: Config, files: Files, context: Context) -> Files | None:
    """The files of samples of their own to validate on; None if none are needed. `files`: those to train on.

    Raises `UserError` if validations are due and there are none.
    """
    data = config.data
    if data.hold_out or not config.validation.is_due:
        return None
    if data.validation_file is not None:
        return open_files(config, context, "validation_file")
    if not files.has_any(str(data.validation_inputs), data.validation_targets):
        raise UserError(
            f"{config.validation.in_words} needs samples to validate on: data.hold_out = 0, and {files.paths[0]} holds "
            f"no {data.validation_inputs}",
            "Name them: data.validation_inputs and data.validation_targets, in data.validation_file if that is another "
            "file. data.hold_out = 0.1 takes some of the samples of classification and regression.",
        )
    return files


def test_files(config: Config, files: Files, context: Context) -> Files | None:
    """The files of samples to test on; None if there are none. `files`: those to train on."""
    data = config.data
    if data.test_file is not None:
        return open_files(config, context, "test_file")
    return files if files.has_any(str(data.test_inputs), data.test_targets) else None
