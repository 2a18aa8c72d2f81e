"""Model FLOPs: what the model's own arithmetic comes to a second, and its share of the device's peak (MFU)."""

from dataclasses import dataclass

from hpc_train.analysis.runs.meta_json import text_at
from hpc_train.analysis.scaling.compare import Group, Row
from hpc_train.core.formatting import plural

GIVEN = "train.peak_tflops"  # meta.json's peak_source where the user gave the peak


@dataclass(frozen=True)
class Flops:
    """Of one row; None is what is not known. FLOPs are counted, never guessed; the peak is read or given."""

    per_sample: float | None  # forward and backward
    per_rank_s: float | None  # model FLOP/s, the mean over all ranks, servers included
    peak_s: float | None  # of one rank's device
    peak_source: str | None

    @property
    def mfu(self) -> float | None:
        """Model FLOPs utilisation (Chowdhery et al., "PaLM", 2022, appendix B): what is computed again for
        activation checkpointing counts as time and not as work.
        """
        return self.per_rank_s / self.peak_s if self.per_rank_s is not None and self.peak_s is not None else None


def flops_of(row: Row) -> Flops:
    """What meta.json and the step times of a row's runs say."""
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
    """Whether its runs are of a version that counts FLOPs, with or without success."""
    return any("flops_per_sample" in run.meta for row in group.rows for run in row.runs)


def flops_notes(group: Group) -> list[str]:
    """Why a figure is missing, and what is odd about one that is there."""
    notes = []
    if lacking := _lacking(group, "flops_per_sample"):
        notes.append(
            f"Model FLOPs missing for {_sizes(lacking)}: the runs do not state one count. torch.utils.flop_counter"
            " could not count this model, or the runs are not alike."
        )
    if lacking := _lacking(group, "peak_flops"):
        devices = dict.fromkeys(text_at(run.meta, "device") or "unknown" for row in lacking for run in row.runs)
        notes.append(
            f"MFU missing for {_sizes(lacking)}: the peak of the device ({', '.join(devices)}) is not known."
            f" {GIVEN} gives it."
        )
    notes += [
        f"{plural(row.size, 'rank')}: an MFU above 100% cannot be: the peak is too low for this device and precision."
        for row in group.rows
        if (flops_of(row).mfu or 0) > 1
    ]
    return notes


def _lacking(group: Group, key: str) -> list[Row]:
    return [row for row in group.rows if row.stated(key) is None]


def _sizes(rows: list[Row]) -> str:
    return ", ".join(dict.fromkeys(plural(row.size, "rank") for row in rows))
