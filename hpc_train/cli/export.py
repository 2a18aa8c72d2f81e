"""`hpc-train export`: the weights of a run as one file for other programs."""

from pathlib import Path
from typing import Literal, cast

import click

from hpc_train.cli.options import UserPath, on_first_rank, overrides_option
from hpc_train.core.errors import require


@click.command()
@click.argument("run", type=UserPath())
@click.argument("out", type=UserPath())
@click.option(
    "--names",
    type=click.Choice(["ours", "gpt2"]),
    help="Names of the tensors: those of this program's model, or of transformers' GPT2LMHeadModel (default for gpt).",
)
@click.option("--step", type=click.IntRange(0), metavar="N", help="The checkpoint after N steps; default: the newest.")
@click.option(
    "--dtype", type=click.Choice(["fp32", "bf16", "fp16"]), help="Of floating-point tensors; default: as they are."
)
@click.option("--force", is_flag=True, help="Overwrite OUT.")
@overrides_option
@on_first_rank
def export(
    run: Path,
    out: Path,
    names: str | None,
    step: int | None,
    dtype: str | None,
    force: bool,
    overrides: tuple[str, ...],
) -> None:
    """Write the weights of RUN's newest checkpoint to OUT.

    The suffix of OUT decides the format: .safetensors, .h5 (a data set for each tensor), or .pt (a state_dict). A gpt
    becomes a GPT-2 of transformers, with config.json beside it. RUN is a run directory or a folder of runs, whose
    newest is taken.

    \b
    Example: hpc-train export runs/gpt-text gpt2/model.safetensors
    """
    require("torch", "h5py", "safetensors")
    from hpc_train.train.comm.startup import open_context

    with open_context(use_mpi=False):
        from hpc_train.train.export import Form
        from hpc_train.train.export import export as write

        form = Form(cast(Literal["ours", "gpt2"] | None, names), step, dtype, force)
        for line in write(run, out, form, overrides):
            click.echo(line)
