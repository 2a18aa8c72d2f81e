"""What the page says of one run: when, where and with what it ran."""

from hpc_train.analysis.runs.load import Run
from hpc_train.analysis.runs.meta_json import dict_at, text_at
from hpc_train.core.formatting import listed


def run_facts(run: Run) -> list[tuple[str, str]]:
    """What the page says of one run."""
    meta = run.meta
    versions = dict_at(meta, "versions")
    told = ", ".join(f"{name} {version}" for name in versions if (version := text_at(versions, name)))
    git = dict_at(meta, "git")
    modified = " with uncommitted changes" if git.get("dirty") else ""
    facts = {
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
        "versions": told,
        "MPI": text_at(dict_at(meta, "mpi"), "version") or "unknown",
        "git commit": (text_at(git, "commit") or "unknown")[:12] + modified,
        "Slurm job": text_at(dict_at(meta, "slurm"), "SLURM_JOB_ID") or text_at(dict_at(meta, "slurm"), "job_id"),
        "incomplete": run.incomplete,
    }
    return [(name, str(value)) for name, value in facts.items() if value not in (None, "")]


def _servers_text(run: Run) -> str:
    return f", {run.size - run.num_servers} workers + {run.num_servers} servers" if run.num_servers else ""


def _attempts_text(run: Run) -> str:
    attempts, repeated = run.summary.num_attempts, run.summary.num_repeated
    return f"; in {attempts} attempts, {repeated} steps taken twice" if attempts > 1 else ""
