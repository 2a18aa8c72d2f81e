"""Paths: special files, impossible names and unusual places."""

import os
import shutil
import socket
from pathlib import Path

from hypothesis import strategies as st

from tests.fuzz.play import Case, Play

_NAMES = [
    *(
        "",
        ".",
        "..",
        "/",
        "//",
        "/dev/null",
        "/dev/zero",
        "/dev/full",
        "/proc/self/mem",
        "/sys",
        "fifo",
        "socket",
        "loop",
        "dangling",
    ),
    *(
        "folder",
        "empty",
        "locked",
        "~nosuchuser/x",
        "~",
        "a" * 300,
        "b/" * 3000,
        "\udcff\udcfe.h5",
        "new\nline.h5",
        "\x1b[2J.toml",
    ),
    *(
        "-",
        "--",
        "http:",
        "http://[",
        "ftp://nowhere/x",
        "file:///etc/passwd",
        ":f",
        "os:system",
        "*.h5",
        "[",
        "{a,b}",
        "$HOME",
        "nul\\",
        "%s%n",
    ),
    *(
        "data.h5",
        "job.toml",
        "table.csv",
        "measured",
        "data.h5/x",
        "data.h5::train",
        "text.h5",
        "folder/",
        " ",
        "é" * 100,
        "CON",
        "hdfs:/",
        "s3://",
    ),
    *("sys:exit", "x.h5?y", "zip://a:b@c", "/proc/1/root", "folder/../data.h5", "data.h5\t", "runs"),
]
# "@" stands for the path; the words after it are valid.
_LINES = [
    *(
        "report @",
        "report measured @",
        "report measured --output @",
        "report measured --figures @ --output o",
        "plan @",
    ),
    *(
        "plan --table @ --predict 8",
        "plan measured --network @ --predict 8",
        "config show @",
        "train @",
        "train job.toml --set data.file=@",
    ),
    *(
        "train job.toml --set run.root=@",
        "train job.toml --resume @",
        "generate @",
        "export @ a.pt",
        "train job.toml --set train.init_from=@",
        "data check @",
        "data info @",
        "data check data.h5 @",
    ),
    *(
        "prepare table out.h5 --target kind --from @",
        "prepare table @ --target kind --from table.csv",
        "prepare images out.h5 --from @",
    ),
    *(
        "prepare text out.h5 --from @",
        "prepare mnist out.h5 --from @",
        "prepare @ out.h5",
        "stage @ there",
        "stage data.h5 @",
    ),
    *("submit job.toml --nodes 2 --dry-run --site @", "submit @ --nodes 2 --dry-run", "config show job.toml --set @"),
]


def _furnish(play: Play) -> None:
    for name, source in (("data.h5", "data-gzip.h5"), ("job.toml", "job.toml"), ("table.csv", "table.csv")):
        (play.folder / name).write_bytes((play.materials / source).read_bytes())
    shutil.copytree(play.materials / "measured", play.folder / "measured")
    os.mkfifo(play.folder / "fifo")
    (play.folder / "loop").symlink_to("loop")
    (play.folder / "dangling").symlink_to("nowhere")
    (play.folder / "text.h5").write_text("hello")
    for name in ("folder", "empty", "locked"):
        (play.folder / name).mkdir()
    (play.folder / "folder" / "x").write_bytes(b"\0\xff" * 9)
    (play.folder / "locked").chmod(0)
    here = os.getcwd()
    os.chdir(play.folder)  # a socket's path may have 107 bytes
    with socket.socket(socket.AF_UNIX) as listens:
        listens.bind("socket")
    os.chdir(here)


def _case(line: str, path: str) -> Case:
    def act(play: Play) -> None:
        _furnish(play)
        words = [word.replace("@", path) for word in line.split()]
        # 1: `data check` found faults, `plan` found nothing that fits
        codes = (0, 1, 2) if words[0] in ("data", "plan") else (0, 2)
        play.hpc_train(*words, codes=codes)

    return f"{line} of {path[:60]!r}", act


_paths = st.one_of(
    st.sampled_from(_NAMES),
    st.sampled_from(_NAMES),
    st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20),
    st.tuples(st.sampled_from(_NAMES), st.sampled_from(_NAMES)).map(lambda told: f"{told[0]}/{told[1]}"),
).filter(lambda path: not Path(path).is_absolute() or path in _NAMES or path.startswith(("/proc/self", "/dev")))
cases: st.SearchStrategy[Case] = st.builds(_case, st.sampled_from(_LINES), _paths)
