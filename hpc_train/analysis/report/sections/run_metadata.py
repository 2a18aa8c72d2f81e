"""When, where and with what each run ran."""

from collections.abc import Sequence

from hpc_train.analysis.guard import SectionGuard
from hpc_train.analysis.report.model import Metadata
from hpc_train.analysis.runs.load import Run
from hpc_train.analysis.runs.memory import peak_memory
from hpc_train.analysis.runs.meta_json import dict_at, text_at
from hpc_train.core.formatting import amount, listed


def runs_metadata(runs: Sequence[Run], guard: SectionGuard) -> tuple[Metadata, tuple[tuple[str, Metadata], ...]]:
    """What all runs share, then each run's label and what differs."""
    every = [guard.call(f"the metadata of {run.label}", _missing, run_metadata, run) for run in runs]
    common = set(every[0]).intersection(*every)
    shared = [pair for pair in every[0] if pair in common]
    own = [[pair for pair in metadata if pair not in common] for metadata in every]
    return shared, tuple((run.label, metadata) for run, metadata in zip(runs, own, strict=True))


def _missing(why: str) -> Metadata:
    return [("missing", why)]


def run_metadata(run: Run) -> Metadata:
    meta = run.meta
    slurm, git, versions = (dict_at(meta, name) for name in ("slurm", "git", "versions"))
    modified = " with uncommitted changes" if git.get("dirty") else ""
    values = {
        "name": run.summary.name,
        "started": text_at(meta, "started") or "unknown",
        "ended": text_at(meta, "ended") or "not recorded",
        "ranks": run.size,
        "hosts": listed(meta["hosts"], 8),
        "CPU": text_at(meta, "cpu_model") or "unknown",
        "steps": f"{run.summary.num_steps}, {run.summary.num_warmup} of them warm-up" + _attempts_text(run),
        "global batch": run.summary.global_batch,
        "reduction": run.config.reduce.strategy + _servers_text(run),
        "device": text_at(meta, "device"),
        "precision": text_at(meta, "precision"),
        "peak memory of a rank": _peak_text(run),
        "versions": ", ".join(f"{name} {version}" for name in versions if (version := text_at(versions, name))),
        "MPI": text_at(dict_at(meta, "mpi"), "version") or "unknown",
        "git commit": (text_at(git, "commit") or "unknown")[:12] + modified,
        "Slurm job": text_at(slurm, "SLURM_JOB_ID") or text_at(slurm, "job_id"),
        "incomplete": run.incomplete,
    }
    return [(name, str(value)) for name, value in values.items() if value not in (None, "")]


def _peak_text(run: Run) -> str:
    """The largest of the ranks' peaks, and what was expected before the first step; empty for older runs."""
    peak = peak_memory(run)
    kinds = {"of its own": peak.own_bytes, "resident with files": peak.resident_bytes, "on its GPU": peak.gpu_bytes}
    peaks = [f"{amount(most, 'B')} {kind}" for kind, most in kinds.items() if most]
    if not peaks or not peak.expected_bytes:
        return ", ".join(peaks)
    where = "on its GPU" if peak.on_gpu else "of its own"
    return f"{', '.join(peaks)}; {amount(peak.expected_bytes, 'B')} expected {where}"


def _servers_text(run: Run) -> str:
    return f", {run.size - run.num_servers} workers + {run.num_servers} servers" if run.num_servers else ""


def _attempts_text(run: Run) -> str:
    num_attempts, num_repeated = run.summary.num_attempts, run.summary.num_repeated
    return f"; {num_attempts} attempts, {num_repeated} steps repeated" if num_attempts > 1 else ""
