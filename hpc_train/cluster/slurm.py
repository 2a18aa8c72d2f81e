"""Jobs for Slurm: a script rendered from slurm/train.sbatch and a site profile, and its way into the queue."""

import difflib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from hpc_train.core import rundir
from hpc_train.core.config import Loaded, dumps, load, read_toml, shown
from hpc_train.core.errors import UserError
from hpc_train.core.paths import expanded
from hpc_train.core.redaction import looks_secret
from hpc_train.core.resume_rules import same_job, why_not
from hpc_train.core.rundir import RunDir, write_atomic
from hpc_train.core.settings import Config, Text

# slurm/ inside an installed wheel, or of the checkout
_FOLDERS = (Path(__file__).parents[1] / "shipped" / "slurm", Path(__file__).parents[2] / "slurm")
_BEGIN, _END = "# ---- settings", "# ---- end of settings\n"
_ANSWER_S = 120.0  # longest wait for Slurm's controller
_LOOK_S = 20.0  # for the queue, where a submission has had no answer already
# sbatch's words where its way to the controller broke: what the controller did is not known then.
# A site's own refusal may say "contact the help desk".
_NO_ANSWER = re.compile(
    r"timed? ?out|unable to contact|connect|communicat|transmi|receiv|send/|unexpected message", re.IGNORECASE
)
_JOB_ID = re.compile(r"[0-9]+(?:;\S*)?")  # a federation adds ;cluster
_TIME = re.compile(
    r"(?:(?P<days>[0-9]{1,3})-)?(?P<first>[0-9]{1,6})(?::(?P<second>[0-9]{1,2}))?(?::(?P<third>[0-9]{1,2}))?"
)


def time_limit_s(text: str) -> int:
    """Seconds of a time limit as sbatch writes it: M, M:S, H:M:S, D-H, D-H:M, D-H:M:S. Raises ValueError."""
    found = _TIME.fullmatch(text)
    if found is None:
        raise ValueError("should be a time limit such as 90 (minutes), 12:00:00 or 1-12:00:00")
    days, *parts = (int(part) if part else 0 for part in found.groups())
    if found["days"] is None and found["third"] is None:  # M or M:S
        parts = [0, *parts[:2]]
    return ((days * 24 + parts[0]) * 60 + parts[1]) * 60 + parts[2]


def _time_limit(text: str) -> str:
    if time_limit_s(text) <= 0:
        raise ValueError("should be more than nothing")
    return text


# sbatch's own lines know no reliable quoting: what stands in them is made of characters that need none.
Word = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:+/@=,-]*$", max_length=200)]
Constraint = Annotated[str, Field(pattern=r"^[A-Za-z0-9\[(][A-Za-z0-9._:+=,&|!*()\[\]-]*$", max_length=200)]
Option = Annotated[str, Field(pattern=r"^--[a-z][a-z-]*(=[A-Za-z0-9._:+/@=,&|*()\[\]%~-]+)?$", max_length=200)]
Time = Annotated[str, AfterValidator(_time_limit)]
Variable = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
Count = Annotated[int, Field(ge=1, le=10**6)]


class Site(BaseModel):
    """What a job script must know of a system; made by `load_site`. Keys are explained in slurm/README.md."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    partition: Word | None = None
    account: Word | None = None
    qos: Word | None = None
    constraint: Constraint | None = None
    time: Time = "01:00:00"
    ranks_per_node: Count = 1
    cores_per_rank: Count | None = None
    gpus_per_node: Count | None = None
    sbatch: list[Option] = []
    signal_s: Annotated[int, Field(ge=10, le=65535)] = 120
    modules: list[Text] = []
    venv: Text | None = None
    scratch: Text | None = None
    launcher: Literal["srun", "mpirun"] = "srun"
    mpi: Word = "pmix"
    bind: list[Text] = []
    energy: Literal["auto", "slurm"] = "auto"
    environment: dict[Variable, Text] = {}

    @model_validator(mode="after")
    def _environment_holds_no_secret(self) -> Self:
        for name, value in self.environment.items():
            if looks_secret(name, value):
                raise ValueError(
                    f"environment.{name} looks like a secret, and job scripts are kept in run directories: "
                    "export it in the shell that submits instead"
                )
            if name == "OMP_NUM_THREADS":
                raise ValueError("environment.OMP_NUM_THREADS: threads are cores_per_rank, or train.threads of a job")
        return self


@dataclass(frozen=True)
class Job:
    """What is to run, on how much of the system. Paths are absolute."""

    name: str
    num_ranks: int
    words: tuple[str, ...]  # of hpc-train
    folder: Path  # to run in: a job file's paths are relative to it
    time: str
    has_launcher: bool = True  # without one, hpc-train runs as one process on one core


def load_site(name: str) -> Site:
    """The site profile of that name, or of that file where `name` is a path. Raises `UserError` naming the key."""
    path = _site_file(name)
    try:
        site = Site.model_validate(read_toml(path, "slurm/sites/generic.toml"))
    except ValidationError as error:
        raise UserError(_explain(error, path), "slurm/README.md explains every key of a site profile.") from None
    paths = {key: _expanded(value, key, path) for key in ("venv", "scratch") if (value := getattr(site, key))}
    return site.model_copy(update=paths)


def _site_file(name: str) -> Path:
    if name.endswith(".toml") or os.sep in name:
        return Path(name)
    shipped = {path.stem: path for folder in _FOLDERS for path in sorted((folder / "sites").glob("*.toml"))}
    if name not in shipped:
        near = difflib.get_close_matches(name, shipped, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(
            f"--site {name}: no profile of that name{hint}",
            f"Shipped profiles: {', '.join(shipped)}. For one of your own give its path: --site ./mysite.toml",
        )
    return shipped[name]


def _explain(error: ValidationError, path: Path) -> str:
    lines = []
    for fault in error.errors(include_url=False):
        key = ".".join(str(part) for part in fault["loc"])
        if fault["type"] == "extra_forbidden":
            near = difflib.get_close_matches(key, Site.model_fields, n=1, cutoff=0.5)
            lines.append(f"{path.name}: unknown key {key}" + (f"; did you mean {near[0]}?" if near else ""))
        elif fault["type"] == "value_error":
            lines.append(f"{path.name}: {key + ': ' if key else ''}{fault['ctx']['error']}")
        else:
            lines.append(f"{path.name}: {key} = {shown(fault['input'])}: {fault['msg'][:1].lower()}{fault['msg'][1:]}")
    return "\n".join(dict.fromkeys(lines))


def _expanded(text: str, key: str, path: Path) -> str:
    """A path with ~ and $NAME of the submitting shell filled in."""
    full = os.path.expanduser(os.path.expandvars(text))
    if "$" in full or not os.path.isabs(full):
        raise UserError(
            f"{path.name}: {key} = '{text}' is no whole path here: '{full}'",
            "Write an absolute path; $NAME is filled in from the shell that submits.",
        )
    return full


# ---------------------------------------------------------------------------------------------- the script


def template() -> str:
    """slurm/train.sbatch, which can be submitted as it is, too."""
    return next(path for folder in _FOLDERS if (path := folder / "train.sbatch").is_file()).read_text()


def render(text: str, site: Site, job: Job) -> str:
    """The job script: `text` with everything between its settings marks replaced. A pure function."""
    head, _, rest = text.partition(_BEGIN)
    _, end, body = rest.partition(_END)
    assert end, "slurm/train.sbatch has lost its marks"
    settings = [f"{_BEGIN}, by hpc-train submit", *_sbatch_lines(site, job), *_assignments(site, job)]
    return head + "\n".join(settings) + "\n" + end + body


def _sbatch_lines(site: Site, job: Job) -> list[str]:
    per_node = min(job.num_ranks, site.ranks_per_node)
    to_shell = "B:" if site.launcher == "mpirun" else ""  # srun's ranks hear Slurm themselves, mpirun's the shell
    optional = {
        "cpus-per-task": site.cores_per_rank,
        "gpus-per-node": site.gpus_per_node if job.has_launcher else None,
        "partition": site.partition,
        "account": site.account,
        "qos": site.qos,
        "constraint": site.constraint,
    }
    options = [
        f"--job-name={job.name}",
        f"--nodes={num_nodes(site, job.num_ranks)}",
        f"--ntasks={job.num_ranks}",
        f"--ntasks-per-node={per_node}",
        *(f"--{key}={value}" for key, value in optional.items() if value is not None),
        f"--time={job.time}",
        *([f"--signal={to_shell}USR2@{site.signal_s}"] if job.has_launcher else []),
        *(["--acctg-freq=energy=1"] if site.energy == "slurm" else []),
        "--output=job-%j.out",  # in the folder that it is submitted from: the run directory
        "--open-mode=append",
        "--requeue",
        *site.sbatch,
    ]
    return [f"#SBATCH {option}" for option in options]


def num_nodes(site: Site, num_ranks: int) -> int:
    return -(-num_ranks // site.ranks_per_node)


def _assignments(site: Site, job: Job) -> list[str]:
    assert site.venv is not None
    values = {**site.environment, **({"TMPDIR": site.scratch} if site.scratch else {})}
    return [
        f"folder={_quoted(job.folder)}",
        f"venv={_quoted(site.venv)}",
        f"modules=({_joined(site.modules)})",
        f"launcher=({_joined(_launcher(site, job))})",
        f"words=({_joined(job.words)})",
        *(f"export {name}={_quoted(value)}" for name, value in values.items()),
    ]


def _launcher(site: Site, job: Job) -> list[str]:
    if not job.has_launcher:
        return ["env"]  # runs its arguments, nothing more
    if site.launcher == "mpirun":
        return ["mpirun", "-n", str(job.num_ranks), *site.bind]
    return ["srun", f"--mpi={site.mpi}", "--kill-on-bad-exit=1", "--unbuffered", *site.bind]


def _joined(words: tuple[str, ...] | list[str]) -> str:
    return " ".join(_quoted(word) for word in words)


def _quoted(value: str | Path) -> str:
    """One word of the shell, whatever it holds. Raises `UserError` for what no script line can hold."""
    text = str(value)
    if not text.isprintable():
        raise UserError(
            f"{text!r} holds a control character, and cannot stand in a job script", "Rename it, or work elsewhere."
        )
    return shlex.quote(text)


# ---------------------------------------------------------------------------------------------- the queue


@dataclass(frozen=True)
class Submitted:
    """A job in the queue."""

    job: str
    run: Path
    script: Path


class _Refused(UserError):
    """Slurm is not here, or did not do what it was asked to."""


class _NoAnswer(Exception):
    """A command of Slurm ended without saying what the controller did; the words tell how."""


def script_for(loaded: Loaded, site: Site, run: Path, num_ranks: int, time: str | None = None) -> str:
    """The script of a training run whose directory is `run`. Raises `UserError`."""
    limit = time or site.time
    try:
        _time_limit(limit)
    except ValueError as error:
        raise UserError(f"--time {limit}: {error}", "Write it as sbatch does: 90, 12:00:00 or 1-12:00:00") from None
    if time_limit_s(limit) <= site.signal_s:
        raise UserError(
            f"--time {limit}: no longer than the {site.signal_s} s before its end at which the job stops (signal_s)",
            "Ask for more time, or set signal_s lower in the site profile.",
        )
    whole = run.absolute()
    if set("\\%") & set(str(whole)):  # sbatch reads both as its own in a file name
        raise UserError(
            f"{whole}: a run directory for Slurm cannot have \\ or % in its path", "Set run.root elsewhere."
        )
    words = ("train", str(whole / "config.toml"), "--resume", str(whole))
    job = Job(loaded.config.name, num_ranks, words, Path.cwd(), limit)
    return render(template(), at_home(site), job)


def at_home(site: Site) -> Site:
    """The site with the environment that this very hpc-train runs in, unless the profile names one."""
    return site.model_copy(update={"venv": site.venv or sys.prefix})


def submit(loaded: Loaded, site: Site, num_ranks: int, time: str | None = None, resume: str = "auto") -> Submitted:
    """Queues a run: the newest unfinished one of this job on as many ranks, or a new one. Raises `UserError`.

    resume: "never" for a new one in any case. Where Slurm refuses it, no new run directory is left; where it may have
    taken it, the directory stays, whatever ended this process.
    """
    config = loaded.config
    left = unfinished(config, num_ranks) if resume == "auto" else None
    if left is not None:
        if was_submitted(left.path) and (job := queued_job(left.path, waiting_jobs())):
            raise UserError(
                f"{left.path} is in the queue, or running, as job {job}",
                "Wait until that job has ended (squeue), or begin another run: --resume never",
            )
        return enqueue(loaded, site, left, num_ranks, time)
    if resume == "auto" and (passed := _newest_passed_over(config, num_ranks)):
        print(f"{passed} A new run begins.", file=sys.stderr)
    run = rundir.create(expanded(config.run.root), config.name, num_ranks, datetime.now(UTC))
    try:
        return enqueue(loaded, site, run, num_ranks, time)
    except BaseException:
        if not was_submitted(run.path):  # ours, seconds old, and not in the queue
            shutil.rmtree(run.path)
        raise


def unfinished(config: Config, num_ranks: int) -> RunDir | None:
    """The newest run of this job on as many ranks that has no summary."""
    left = [run for run in _without_summary(config) if run.size == num_ranks and is_of(run, config)]
    return left[-1] if left else None


def _newest_passed_over(config: Config, num_ranks: int) -> str | None:
    """Why the newest unfinished run of this name is not continued; None if there is none."""
    left = _without_summary(config)
    why = why_not(left[-1], _job_of(left[-1]), config, left[-1].size, num_ranks) if left else None
    return f"{left[-1].path} is not continued: {why}." if why else None


def _without_summary(config: Config) -> list[RunDir]:
    """The unfinished runs of this name, oldest first."""
    runs = (RunDir(path.parent) for path in (expanded(config.run.root) / config.name).glob("*/config.toml"))
    return sorted((run for run in runs if not run.summary.exists()), key=lambda run: run.path.name)


def is_of(run: RunDir, config: Config) -> bool:
    """Whether the run was begun with this job."""
    theirs = _job_of(run)
    return theirs is not None and same_job(theirs, config)


def _job_of(run: RunDir) -> Config | None:
    try:
        return load(run.config).config
    except UserError:
        return None


def enqueue(
    loaded: Loaded, site: Site, run: RunDir, num_ranks: int, time: str | None = None, after: tuple[str, ...] = ()
) -> Submitted:
    """Queues the training run of directory `run`, to start once the jobs `after` have ended in whatever way."""
    script = run.path / "train.sbatch"
    content = script_for(loaded, site, run.path, num_ranks, time)
    write_atomic(run.config, dumps(loaded))
    write_atomic(script, content)
    _record_submission(run.path, None)  # before Slurm can have the job: from here on its directory stays
    try:
        job = sbatch(script, after)
    except _Refused:
        _record(run.path).unlink(missing_ok=True)
        raise
    try:
        _record_submission(run.path, job)
    except UserError as error:  # a full disk; the queue tells the job, too
        print(f"hpc-train: {_taken(job)}\n{error}", file=sys.stderr)
    return Submitted(job, run.path, script)


def sbatch(script: Path, after: tuple[str, ...] = ()) -> str:
    """Hands a script to Slurm from its own folder and returns the job's id.

    Raises `UserError`: with Slurm's words where it refused; where it may have accepted the job all the same, with that.
    """
    dependency = [f"--dependency=afterany:{':'.join(after)}"] if after else []
    try:
        said = _ask("sbatch", "--parsable", *dependency, script.name, cwd=script.parent).split()
        if not said or not _JOB_ID.fullmatch(said[-1]):
            raise _NoAnswer(f"sbatch told no job: {' '.join(said)!r}")
        return said[-1].partition(";")[0]
    except _NoAnswer as fault:
        job = _find_job(script.parent)
        if job is None:
            raise _may_be_taken(script.parent, str(fault)) from None
        print(f"hpc-train: {fault}. {_taken(job)}", file=sys.stderr)
        return job
    except KeyboardInterrupt:
        job = _find_job(script.parent)
        print(f"hpc-train: {_taken(job) if job else _may_be_taken(script.parent, 'Ctrl-C')}", file=sys.stderr)
        raise


def waiting_jobs(answer_s: float | None = None) -> dict[str, str]:
    """This user's jobs that are in the queue or running: id -> the folder that each was submitted from."""
    try:
        lines = _ask("squeue", "--me", "--noheader", "--format=%A %Z", answer_s=answer_s).splitlines()
    except _NoAnswer as fault:
        raise UserError(str(fault), "Look with `sinfo`; try again.") from None
    return {job: folder.strip() for job, _, folder in (line.strip().partition(" ") for line in lines)}


def queued_job(run: Path, queue: Mapping[str, str]) -> str | None:
    """The job of `queue` that works in the run directory `run`, as its record or the job's own folder tells."""
    told = _submitted_job(run)
    if told in queue:
        return told
    here = os.path.realpath(run)
    return next((job for job, folder in queue.items() if folder and os.path.realpath(folder) == here), None)


def was_submitted(run: Path) -> bool:
    """Whether Slurm has, had or may have a job of this run."""
    return _record(run).exists()


def _submitted_job(run: Path) -> str | None:
    """The id of the job that `run` was last submitted as, where it is known."""
    try:
        record: Any = json.loads(_record(run).read_text(encoding="utf-8"))
        return None if record["job"] is None else str(record["job"])
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _record_submission(run: Path, job: str | None) -> None:
    """job: None before Slurm has told it."""
    record = {"job": job, "submitted": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"}
    write_atomic(_record(run), json.dumps(record) + "\n")


def _record(run: Path) -> Path:
    return run / "submitted.json"


def _find_job(folder: Path) -> str | None:
    try:
        return queued_job(folder, waiting_jobs(_LOOK_S))
    except UserError:
        return None


def _taken(job: str) -> str:
    return f"Slurm has the job: {job} is in the queue (scancel {job} removes it)"


def _may_be_taken(folder: Path, fault: str) -> UserError:
    return UserError(
        f"{fault}: Slurm may have accepted the job all the same, so {folder} is kept",
        'Look in a minute: squeue --me --format="%A %Z" shows each job and its folder. Where no job has this one, the '
        "same command again submits it.",
    )


def _ask(*words: str, cwd: Path | None = None, answer_s: float | None = None) -> str:
    """What a command of Slurm prints. Raises `_Refused`, or `_NoAnswer` where it hangs or its way to Slurm broke."""
    patience_s = answer_s or _ANSWER_S
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:  # no pipes: whoever holds one keeps us
        try:
            # A process group of its own, so that all of a site's wrapper can be ended.
            child = subprocess.Popen(words, cwd=cwd, stdin=subprocess.DEVNULL, stdout=out, stderr=err, process_group=0)
        except OSError as error:
            why = "was not found" if isinstance(error, FileNotFoundError) else f"cannot be started ({error.strerror})"
            raise _Refused(
                f"{words[0]} {why}: no Slurm here", "Submit on a login node; --dry-run shows the script anywhere."
            ) from None
        try:
            code = child.wait(patience_s)
        except subprocess.TimeoutExpired:
            raise _NoAnswer(f"{words[0]} did not answer for {patience_s:.0f} s") from None
        finally:  # it is ended where it took too long, or Ctrl-C came
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
        told, complaint = (_whole(file) for file in (out, err))
    if code < 0 or (code and _NO_ANSWER.search(complaint)):
        raise _NoAnswer(f"{words[0]}: {complaint.strip() or f'ended by signal {-code}'}")
    if code:
        said = complaint.strip() or f"exit code {code}"
        raise _Refused(f"{words[0]}: {said}", "Slurm did not take it: mend the site profile or the request.")
    if complaint:
        print(complaint.rstrip(), file=sys.stderr)
    return told


def _whole(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")
