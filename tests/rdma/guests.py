"""Two emulated guests with Soft-RoCE on a network of their own, whose files are this machine's, read-only.

No image is built: a guest boots Debian's kernel, which has rdma_rxe, with a small initrd, and sees our own /, venv and
all, through 9p. What it writes lies in its memory, but for one folder that it shares with us.
"""

import gzip
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from time import monotonic, sleep

HERE = Path(__file__).parent
MODULES = (
    *("virtio_pci", "9p", "9pnet_virtio", "overlay", "virtio_net"),
    *("crc32_generic", "ib_uverbs", "rdma_rxe"),  # without crc32_generic rxe says that it has no memory
)
NEEDED = {  # command -> Debian's package
    "qemu-system-x86_64": "qemu-system-x86",
    "busybox": "busybox-static",
    "modprobe": "kmod",
    "ibv_devinfo": "ibverbs-utils",
    "rdma": "iproute2",
    "apt-get": "apt",
}
MEMORY_MB = 2048


def why_not() -> str | None:
    """Why this machine cannot have guests, or None."""
    if os.geteuid() != 0:
        return "not root: the guests read this machine's files as they are"
    missing = {package for command, package in NEEDED.items() if not shutil.which(command)}
    if not list(Path("/usr/lib").glob("*/libibverbs/librxe-*.so")):
        missing.add("ibverbs-providers")
    return f"not installed: apt-get install --no-install-recommends {' '.join(sorted(missing))}" if missing else None


def make_boot(folder: Path) -> None:
    """Puts Debian's newest kernel and an initrd for it into `folder`, unless they are there: a download of 70 MB."""
    if (folder / "initrd.gz").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as name:
        work = Path(name)
        depends = _output("apt-cache", "depends", "linux-image-amd64")
        package = next(line.split()[-1] for line in depends.splitlines() if line.strip().startswith("Depends:"))
        _output("apt-get", "-o", "APT::Sandbox::User=root", "download", "-qq", package, cwd=work)
        (deb,) = work.glob("*.deb")
        _output("dpkg", "-x", deb, work / "kernel")
        (version,) = (path.name for path in (work / "kernel/lib/modules").iterdir())
        _output("depmod", "-b", work / "kernel", version)
        _make_initrd(work, version)
        os.replace(work / f"kernel/boot/vmlinuz-{version}", folder / "vmlinuz")
        os.replace(work / "initrd.gz", folder / "initrd.gz")


def _make_initrd(work: Path, version: str) -> None:
    root = work / "root"
    for inside in ("bin", "modules", "dev", "proc", "sys", "host", "layer", "root"):
        (root / inside).mkdir(parents=True)
    shutil.copy(shutil.which("busybox") or "", root / "bin")
    shutil.copy(HERE / "init.sh", root / "init")
    paths: dict[str, None] = {}  # in the order in which they are loaded, each once
    for module in MODULES:
        shown = _output("modprobe", "-d", work / "kernel", "-S", version, "--show-depends", module)
        paths.update(dict.fromkeys(line.split()[1] for line in shown.splitlines() if line.startswith("insmod")))
    for number, path in enumerate(paths):
        shutil.copy(path, root / f"modules/{number:02}-{Path(path).name}")
    names = "\n".join(str(path.relative_to(root)) for path in sorted(root.rglob("*")))
    packed = subprocess.run(
        ["busybox", "cpio", "-o", "-H", "newc"], cwd=root, input=names.encode(), stdout=subprocess.PIPE, check=True
    )
    (work / "initrd.gz").write_bytes(gzip.compress(packed.stdout, 1))


def run(boot: Path, shared: Path, timeout_s: float) -> float:
    """Boots both guests, which see `shared` as /shared, and waits until they power off. Returns the seconds.

    Raises RuntimeError, with their last output, if they do not power off, or do so before all was done.
    """
    began = monotonic()
    guests = []
    try:
        for number in (1, 2):
            guests.append(_boot(boot, shared, number))
            while number == 1 and not (shared / "link").exists():  # which guest 2 joins
                _check(guests, shared, began, timeout_s)
                sleep(0.1)
        while any(guest.poll() is None for guest in guests):
            _check(guests, shared, began, timeout_s)
            sleep(0.2)
    finally:
        for guest in guests:
            guest.kill()
            guest.wait()
    if not (shared / "stop").exists():  # which guest 1 makes at its end
        raise RuntimeError(f"the guests ended early:\n{_said(shared)}")
    return monotonic() - began


def _check(guests: list["subprocess.Popen[bytes]"], shared: Path, began: float, timeout_s: float) -> None:
    failed = any(guest.poll() for guest in guests)
    if failed or monotonic() - began > timeout_s:
        what = "failed" if failed else f"were not done within {timeout_s:g} s"
        raise RuntimeError(f"the guests {what}:\n{_said(shared)}")


def _said(shared: Path) -> str:
    return "\n".join(path.read_text(errors="replace")[-2000:] for path in sorted(shared.glob("*.console")))


def _boot(boot: Path, shared: Path, number: int) -> "subprocess.Popen[bytes]":
    said = f"console=ttyS0 quiet mitigations=off panic=-1 number={number} script={HERE / 'guest.sh'}"
    serves = "on" if number == 1 else "off"
    # Of each packet the headers are kept. By the first guest alone: both would see all of it.
    capture = ["-object", f"filter-dump,id=capture,netdev=link,file={shared}/wire.pcap,maxlen=80"] * (number == 1)
    return subprocess.Popen(
        [
            *("setpriv", "--pdeathsig", "KILL", "qemu-system-x86_64"),
            *("-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "1", "-m", f"{MEMORY_MB}M"),
            *("-display", "none", "-no-reboot", "-monitor", "none", "-nic", "none"),
            *("-serial", f"file:{shared / f'n{number}.console'}"),
            *("-kernel", boot / "vmlinuz", "-initrd", boot / "initrd.gz", "-append", said),
            *("-fsdev", "local,id=host,path=/,security_model=none,readonly=on,multidevs=remap"),
            *("-device", "virtio-9p-pci,fsdev=host,mount_tag=host"),
            *("-fsdev", f"local,id=out,path={shared},security_model=none"),
            *("-device", "virtio-9p-pci,fsdev=out,mount_tag=out"),
            *("-netdev", f"stream,id=link,server={serves},addr.type=unix,addr.path={shared}/link"),
            *capture,
            *("-device", f"virtio-net-pci,netdev=link,mac=52:54:00:00:00:0{number},romfile="),
        ],
        stdin=subprocess.DEVNULL,
    )


def _output(*words: object, cwd: Path | None = None) -> str:
    return subprocess.run([str(word) for word in words], cwd=cwd, capture_output=True, text=True, check=True).stdout
