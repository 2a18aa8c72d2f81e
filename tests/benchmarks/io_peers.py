"""A virtual environment with the peers that reading is measured against, made once."""

import subprocess
import sys
import sysconfig
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

# What a peer needs to read local files; its own list would bring another torch, or libraries of every cloud.
PEERS = {
    "WebDataset": ("webdataset", "braceexpand", "pyyaml"),
    "mosaicml-streaming": (
        *("mosaicml-streaming", "Brotli", "python-snappy", "tqdm", "transformers<5", "xxhash", "zstd", "catalogue"),
        *("requests", "filelock"),
    ),
    "litdata": ("litdata", "lightning-utilities", "filelock", "boto3", "requests", "tifffile", "obstore"),
}
_KEPT = ("torch", "numpy")  # as this environment has them


def install(
    folder: Path, say: Callable[[str], None], peers: Mapping[str, Sequence[str]] = PEERS, build_here: bool = False
) -> dict[str, Path]:
    """The python of each peer that could be installed; of another it is said why not.

    peers: by name, a package without what it needs, then what it needs. build_here: of what must be built, with this
    environment's torch.
    """
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        site = sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)})
        (Path(site) / "project.pth").write_text(sysconfig.get_path("purelib") + "\n")
    kept = folder / "kept.txt"
    kept.write_text("".join(f"{name}=={version(name)}\n" for name in _KEPT))
    found = {}
    for peer, (package, *needs) in peers.items():
        mark = folder / f"{package}.installed"
        if not mark.exists():
            say(f"installing {peer}")
            for words in (["--no-deps", package], ["--constraint", str(kept), *needs]):
                pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *words]
                pip += ["--no-build-isolation"] if build_here else []
                done = subprocess.run(pip, capture_output=True, text=True)
                if done.returncode:
                    break
            if done.returncode:
                say(f"{peer} is left out: it cannot be installed: {last_line(done.stderr)}")
                continue
            mark.touch()
        found[peer] = python
    return found


def last_line(text: str) -> str:
    """The last line that says something."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "it said nothing")
