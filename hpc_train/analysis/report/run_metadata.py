"""What the page says of one run: when, where and with what it ran."""

from hpc_train.analysis.runs.load import Run, section, word
from hpc_train.core.formatting import listed


def run_facts(run: Run) -> list[tuple[str, str]]:
    """What the page says of one run."""
    meta = run.meta
    versions = section(meta, "versions")
    told = ", ".join(f"{name} {version}" for name in versions if (version := word(versions, name)))
    git = section(meta, "git")
    modified = " with uncommitted changes" if git.get("dirty") else ""
    facts = {
        "name": run.summary.name,
        "started": word(meta, "started") or "unknown",
        "ended": word(meta, "ended") or "not recorded",
        "ranks": run.size,
        "hosts": listed(meta["hosts"], 8),
        "CPU": word(meta, "cpu_model") or "unknown",
        "steps": f"{run.summary.num_steps}, {run.summary.num_warmup} of them warm-up" + _attempts_text(run),
        "global batch": run.summary.global_batch,
        "reduction": run.config.reduce.strategy + _servers_text(run),
        "device": word(meta, "device"),
        "precision": word(meta, "precision"),
        "versions": told,
        "MPI": word(section(meta, "mpi"), "version") or "unknown",
        "git commit": (word(git, "commit") or "unknown")[:12] + modified,
        "Slurm job": word(section(meta, "slurm"), "SLURM_JOB_ID") or word(section(meta, "slurm"), "job_id"),
        "incomplete": run.incomplete,
    }
    return [(name, str(value)) for name, value in facts.items() if value not in (None, "")]


def _servers_text(run: Run) -> str:
    return f", {run.size - run.num_servers} workers + {run.num_servers} servers" if run.num_servers else ""


def _attempts_text(run: Run) -> str:
    attempts, repeated = run.summary.num_attempts, run.summary.num_repeated
    return f"; in {attempts} attempts, {repeated} steps taken twice" if attempts > 1 else ""
