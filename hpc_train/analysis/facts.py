"""What the page says of one run: when, where and with what it ran."""

from hpc_train.analysis.load import Run, section
from hpc_train.analysis.words import listed


def run_facts(run: Run) -> list[tuple[str, str]]:
    """What the page says of one run."""
    meta = run.meta
    versions = ", ".join(f"{name} {version}" for name, version in section(meta, "versions").items())
    git = section(meta, "git")
    modified = " with uncommitted changes" if git.get("dirty") else ""
    facts = {
        "name": run.summary.name,
        "started": meta.get("started", "unknown"),
        "ended": meta.get("ended", "not recorded"),
        "ranks": run.size,
        "hosts": listed(meta["hosts"], 8),
        "CPU": meta.get("cpu_model", "unknown"),
        "steps": f"{run.summary.num_steps}, {run.summary.num_warmup} of them warm-up" + _attempts_text(run),
        "global batch": run.summary.global_batch,
        "reduction": run.config.reduce.strategy + _servers_text(run),
        "device": meta.get("device"),
        "precision": meta.get("precision"),
        "versions": versions,
        "MPI": section(meta, "mpi").get("version", "unknown"),
        "git commit": str(git.get("commit", "unknown"))[:12] + modified,
        "Slurm job": section(meta, "slurm").get("job_id"),
        "incomplete": run.incomplete,
    }
    return [(name, str(value)) for name, value in facts.items() if value not in (None, "")]


def _servers_text(run: Run) -> str:
    return f", {run.size - run.num_servers} workers + {run.num_servers} servers" if run.num_servers else ""


def _attempts_text(run: Run) -> str:
    attempts, repeated = run.summary.num_attempts, run.summary.num_repeated
    return f"; in {attempts} attempts, {repeated} steps taken twice" if attempts > 1 else ""
