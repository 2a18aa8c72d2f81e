"""Slurm: sbatch and squeue."""

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hpc_train.cluster import job_script
from hpc_train.cluster.scheduler import Job, NoAnswer, Refused, run_command
from hpc_train.cluster.site_profile import SiteProfile
from hpc_train.core.errors import UserError

_JOB_ID = re.compile(r"[0-9]+(?:;\S*)?")  # a federation adds ;cluster
# What Slurm's commands print when their connection to the controller broke: whether it accepted the job is unknown.
# Narrow, because a site's own refusal may say "contact the help desk".
_CONNECTION_BROKE = re.compile(
    r"timed? ?out|unable to contact|connect|communicat|transmi|receiv|send/|unexpected message", re.IGNORECASE
)


@dataclass(frozen=True)
class Slurm:
    """The `Scheduler` of a machine with Slurm. answer_s: longest wait for its controller."""

    answer_s: float = 120.0
    name = "Slurm"
    list_command = 'squeue --me --format="%A %Z"'
    start_command = "squeue --start --job {job}"
    cancel_command = "scancel {job}"

    def render(self, job: Job, site: SiteProfile) -> str:
        return job_script.render(job, site)

    def submit(self, script: Path, after: Sequence[str] = ()) -> str:
        dependency = [f"--dependency=afterany:{':'.join(after)}"] if after else []
        answer = self._run(["sbatch", "--parsable", *dependency, script.name], script.parent, self.answer_s).split()
        if not answer or not _JOB_ID.fullmatch(answer[-1]):
            raise NoAnswer(f"sbatch printed no job id: {' '.join(answer)!r}")
        return answer[-1].partition(";")[0]

    def waiting_jobs(self, answer_s: float | None = None) -> dict[str, str]:
        command = ["squeue", "--me", "--noheader", "--format=%A %Z"]
        try:
            lines = self._run(command, None, answer_s or self.answer_s).splitlines()
        except NoAnswer as fault:
            raise UserError(str(fault), "Check Slurm with `sinfo`, then try again.") from None
        return {job: folder.strip() for job, _, folder in (line.strip().partition(" ") for line in lines)}

    @staticmethod
    def _run(command: Sequence[str], folder: Path | None, answer_s: float) -> str:
        """What a command prints. Raises `Refused` or `NoAnswer`."""
        code, out, err = run_command(command, folder, answer_s)
        if code < 0 or (code and _CONNECTION_BROKE.search(err)):
            raise NoAnswer(f"{command[0]}: {err.strip() or f'killed by signal {-code}'}")
        if code:
            message = err.strip() or f"exit code {code}"
            raise Refused(f"{command[0]}: {message}", "Slurm refused it: correct the site profile or the request.")
        if err:
            print(err.rstrip(), file=sys.stderr)
        return out
