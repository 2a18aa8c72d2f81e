"""Model FLOP/s, and their share of the device's peak (MFU)."""

from dataclasses import dataclass

from hpc_train.analysis.runs.meta_json import text_at
from hpc_train.analysis.scaling.compare import Group
from hpc_train.analysis.scaling.rows import Row

GIVEN = "train.peak_tflops"  # meta.json's peak_source where the user gave the peak


@dataclass(frozen=True)
class Flops:
    """Of one row; None is unknown. FLOPs are counted, never estimated; the peak is from a table or given."""

    per_sample: float | None  # forward and backward
    per_rank_s: float | None  # model FLOP/s, the mean over all ranks, servers included
    peak_s: float | None  # of one rank's device
    peak_source: str | None

    @property
    def mfu(self) -> float | None:
        """Model FLOPs utilisation (Chowdhery et al., "PaLM", 2022, appendix B): recomputation for activation
        checkpointing counts as time, not as work.
        """
        return self.per_rank_s / self.peak_s if self.per_rank_s is not None and self.peak_s is not None else None


def flops_of(row: Row) -> Flops:
    """From meta.json and the step times of a row's runs."""
    per_sample, peak = row.stated("flops_per_sample"), row.stated("peak_flops")
    known = per_sample is not None and row.samples_per_s is not None
    sources = {text_at(run.meta, "peak_source") or "source not recorded" for run in row.runs}
    return Flops(
        per_sample,
        per_sample * row.samples_per_s / row.size if known else None,  # type: ignore[operator]
        peak,
        " / ".join(sorted(sources)) if peak is not None else None,
    )


def counts_flops(group: Group) -> bool:
    """Whether its runs are of a version that counts FLOPs, successfully or not."""
    return any("flops_per_sample" in run.meta for run in group.runs)
