"""Joules of a node: from its meters where they can be read, else an estimate that is labelled as one.

One rank of each node reads for the whole node, however many ranks it has. Meters count joules up from some unknown
start; what is written are joules since the sampler began.
"""

import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, time
from types import TracebackType
from typing import Any

from hpc_train.errors import UserError, not_written
from hpc_train.records import ENERGY_COLUMNS, Quality, close_log, open_log

POWERCAP = Path("sys/class/powercap")


@dataclass(frozen=True)
class Meter:
    """One domain of a node (a processor package, its memory, a GPU). `read` gives cumulative joules or OSError."""

    domain: str
    source: str
    quality: Quality
    read: Callable[[], float]


def find_meters(root: Path = Path("/")) -> list[Meter]:
    """Every meter that this user can read now. `root` is where /sys lies, so that recorded trees can be read."""
    return rapl_meters(root) + nvml_meters(root)


def rapl_meters(root: Path) -> list[Meter]:
    """Intel and AMD processors: packages and their memory (kernel documentation, power/powercap).

    The zones "core" and "uncore" are parts of their package, and "psys" contains it: counting them too would count
    joules twice. Since Linux 5.10 only root may read the counters.
    """
    meters = []
    for zone in sorted((root / POWERCAP).glob("intel-rapl:*")):
        name = (zone / "name").read_text().strip()
        if not name.startswith(("package", "dram")):
            continue
        package = zone.name.split(":")[1]
        try:
            int((zone / "energy_uj").read_text())
            wrap_uj = int((zone / "max_energy_range_uj").read_text())
        except OSError:
            continue  # not readable by this user: no meter
        label = name if name.startswith("package") else f"{name}-{package}"
        meters.append(Meter(label, "RAPL", "measured", _rapl_reader(zone / "energy_uj", wrap_uj)))
    return meters


def _rapl_reader(path: Path, wrap_uj: int) -> Callable[[], float]:
    """Cumulative joules of a counter that starts again at `wrap_uj` (every minute or so under full load)."""
    last_uj = int(path.read_text())
    total_uj = 0

    def read() -> float:
        nonlocal last_uj, total_uj
        now_uj = int(path.read_text())
        total_uj += now_uj - last_uj if now_uj >= last_uj else now_uj + wrap_uj - last_uj
        last_uj = now_uj
        return total_uj / 1e6

    return read


def nvml_meters(root: Path) -> list[Meter]:
    """NVIDIA GPUs from Volta on: nvmlDeviceGetTotalEnergyConsumption, mJ since the driver was loaded.

    The counter, not the power: NVML's power readings cover a quarter of the time on recent GPUs.
    """
    if not (root / "dev/nvidiactl").exists():
        return []
    try:
        import pynvml
    except ImportError:
        return []
    meters = []
    try:
        pynvml.nvmlInit()
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
            meters.append(Meter(f"gpu-{index}", "NVML", "measured", _nvml_reader(pynvml, handle)))
    except pynvml.NVMLError:
        return meters  # no driver, or a GPU without the counter
    return meters


def _nvml_reader(pynvml: Any, handle: Any) -> Callable[[], float]:
    def read() -> float:
        try:
            return pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3
        except pynvml.NVMLError as error:
            raise OSError(f"NVML: {error}") from None

    return read


def estimate_meter(num_cores: int, watts_per_core: float) -> Meter:
    """An assumption, not a meter: the cores of this node's ranks draw `watts_per_core` for as long as the run lasts."""
    watts = num_cores * watts_per_core
    source = f"estimate: {watts_per_core:g} W x {num_cores} core{'s' * (num_cores != 1)} a node"
    return Meter("cores", source, "estimated", lambda: monotonic() * watts)


class Sampler:
    """Writes every meter's joules `hz` times a second, and at the beginning and the end, from a thread of its own."""

    def __init__(self, meters: list[Meter], path: Path, hz: float, attempt: int = 1) -> None:
        self._meters, self._attempt = meters, attempt
        self._period_s = 1.0 / hz
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="energy", daemon=True)
        self._began = [meter.read() for meter in meters]
        assert not any("," in meter.domain + meter.source for meter in meters), "a comma would end the CSV cell"
        self._file = open_log(path, ENERGY_COLUMNS)

    def __enter__(self) -> None:
        self._began = [meter.read() for meter in self._meters]
        self._sample()
        self._thread.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        try:
            self._sample()
        finally:
            close_log(self._file)

    def _loop(self) -> None:
        while not self._stop.wait(self._period_s):
            with suppress(UserError):  # readings are cumulative: the next one that can be written makes up for it
                self._sample()

    def _sample(self) -> None:
        now_s, lines = time(), []
        for meter, began in zip(self._meters, self._began, strict=True):
            try:
                reading = f"{meter.read() - began:.6f},{meter.quality}"
            except OSError:  # a meter that fails while the job runs must not end the job, nor pass for measured
                reading = ",missing"
            lines.append(f"{now_s:.3f},{meter.domain},{reading},{meter.source},{self._attempt}\n")
        text = "".join(lines)
        try:
            self._file.write(text)
            self._file.flush()
        except OSError as error:
            raise not_written(self._file.name, error, len(text)) from None
