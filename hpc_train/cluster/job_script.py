"""Job scripts for Slurm: slurm/train.sbatch with the settings of a site and a job. Pure functions."""

import shlex
from collections.abc import Iterable
from pathlib import Path

from hpc_train.cluster import launch
from hpc_train.cluster.scheduler import Job
from hpc_train.cluster.site_profile import SLURM_FOLDERS, SiteProfile
from hpc_train.core.errors import UserError

_BEGIN, _END = "# ---- settings", "# ---- end of settings\n"


def template() -> str:
    """slurm/train.sbatch, which can also be submitted as it is."""
    return next(path for folder in SLURM_FOLDERS if (path := folder / "train.sbatch").is_file()).read_text()


def render(job: Job, site: SiteProfile) -> str:
    """The template with everything between its settings marks replaced. Raises `UserError`."""
    if set("\\%") & set(str(job.output_folder)):  # sbatch gives both a meaning of its own in file names
        raise UserError(
            f"{job.output_folder}: a run directory for Slurm cannot have \\ or % in its path", "Set run.root elsewhere."
        )
    head, _, rest = template().partition(_BEGIN)
    _, end, body = rest.partition(_END)
    assert end, "slurm/train.sbatch has lost its marks"
    settings = [f"{_BEGIN}, by hpc-train submit", *_sbatch_lines(job, site), *_assignments(job, site)]
    return head + "\n".join(settings) + "\n" + end + body


def _sbatch_lines(job: Job, site: SiteProfile) -> list[str]:
    # Slurm signals the ranks of srun directly. mpirun's ranks get their signal from the script ("B:").
    signal = f"{'B:' if site.launcher == 'mpirun' else ''}USR2@{site.signal_s}"
    options = {
        "job-name": job.name,
        "nodes": site.num_nodes(job.num_ranks),
        "ntasks": job.num_ranks,
        "ntasks-per-node": min(job.num_ranks, site.ranks_per_node),
        "cpus-per-task": site.cores_per_rank,
        "gpus-per-node": site.gpus_per_node if job.has_launcher else None,
        "partition": site.partition,
        "account": site.account,
        "qos": site.qos,
        "constraint": site.constraint,
        "time": job.time_limit,
        "signal": signal if job.has_launcher else None,
        "acctg-freq": "energy=1" if site.energy == "slurm" else None,
        "output": "job-%j.out",  # in the folder that the script is submitted from: the run directory
        "open-mode": "append",
    }
    lines = [f"--{name}={value}" for name, value in options.items() if value is not None]
    return [f"#SBATCH {line}" for line in (*lines, "--requeue", *site.sbatch)]


def _assignments(job: Job, site: SiteProfile) -> list[str]:
    assert site.venv is not None
    exports = {**site.environment, **({"TMPDIR": site.scratch} if site.scratch else {})}
    launcher = launch.in_job(site, job.num_ranks) if job.has_launcher else ["env"]  # env only runs its arguments
    return [
        f"folder={_quoted(job.working_folder)}",
        f"venv={_quoted(site.venv)}",
        f"modules=({_joined(site.modules)})",
        f"launcher=({_joined(launcher)})",
        f"words=({_joined(job.arguments)})",
        *(f"export {name}={_quoted(value)}" for name, value in exports.items()),
    ]


def _joined(words: Iterable[str]) -> str:
    return " ".join(_quoted(word) for word in words)


def _quoted(value: str | Path) -> str:
    """One word of the shell. Raises `UserError` for what no line of a script can contain."""
    text = str(value)
    if not text.isprintable():
        raise UserError(
            f"{text!r} has a control character, and cannot be part of a job script", "Rename it, or work elsewhere."
        )
    return shlex.quote(text)
