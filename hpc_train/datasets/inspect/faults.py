"""A fault of a data file, as `data check` and `data info` report it."""

from dataclasses import dataclass

RESTORE = "Restore the file, or prepare it again."
PREPARE_AGAIN = "Prepare the file again."


@dataclass(frozen=True)
class Fault:
    """Something wrong in a file.

    dataset: "" for the file itself. samples: first and last affected. number: which `unit` (chunk, block or rows).
    """

    kind: str
    file: str
    dataset: str
    what: str
    remedy: str = ""
    unit: str = ""
    number: int | None = None
    samples: tuple[int, int] | None = None

    def __str__(self) -> str:
        where = [self.file, self.dataset] if self.dataset else [self.file]
        if self.samples is not None:
            first, last = self.samples
            number = f"{self.unit} {self.number:,}, " if self.number is not None else ""
            where.append(f"{number}sample {first:,}" if first == last else f"{number}samples {first:,} to {last:,}")
        remedy = f"\n  {self.remedy}" if self.remedy else ""
        return f"{': '.join(where)}: {self.what}{remedy}"
