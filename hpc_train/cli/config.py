"""`hpc-train config`: look at job files."""

from pathlib import Path

import click

from hpc_train.cli.options import CommandGroup, UserPath, job_file, on_first_rank, overrides_option
from hpc_train.core.config import dumps, load


@click.group(cls=CommandGroup)
def config() -> None:
    """Look at job files.

    \b
    Example: hpc-train config show configs/mlp-mnist.toml
    """


@config.command("show")
@click.argument("config", type=UserPath())
@overrides_option
@on_first_rank
def show(config: Path, overrides: tuple[str, ...]) -> None:
    """Print the job CONFIG with all defaults: every key, and where its value came from.

    \b
    Example: hpc-train config show configs/softmax-mnist.toml --set train.lr=0.1
    """
    click.echo(dumps(load(job_file(config), overrides)), nl=False)
