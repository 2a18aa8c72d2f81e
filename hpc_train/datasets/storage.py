"""Files elsewhere: on a web server, HDFS, S3 or another disk, each through fsspec and its client."""

import re
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit
from uuid import uuid4

from hpc_train.core import redaction
from hpc_train.core.errors import UserError

T = TypeVar("T")
_PIECE_BYTES = 8 << 20
_CALL_TIMEOUT_S = 30.0
_NAMENODE_PORT = 8020
_DATANODE_TIMEOUT_S = 20.0  # a third of what `stage --wait` waits: one that hangs leaves time to ask another
# What tells that a source has changed; each kind of storage has some of them.
_VERSION_KEYS = ("ETag", "Last-Modified", "LastModified", "mtime", "modificationTime", "modification_time")
# The package of each scheme's client, where it is not called like the scheme.
_CLIENTS = {
    "http": "aiohttp",
    "https": "aiohttp",
    "webhdfs": "requests",
    "hdfs": "hdfs-native",
    "viewfs": "hdfs-native",
    "s3": "s3fs",
    "s3a": "s3fs",
    "gs": "gcsfs",
    "sftp": "paramiko",
}


@dataclass(frozen=True)
class Source:
    """A file as its storage describes it. `url` holds no secrets; `sha256` only where the source tells it."""

    url: str
    fs: Any
    path: str
    name: str
    num_bytes: int
    version: dict[str, str]
    in_ranges: bool  # else only from its start to its end
    sha256: str | None


def is_url(text: str) -> bool:
    return "://" in text


def without_secrets(text: str) -> str:
    """`text` without the passwords and tokens that its URLs carry before the host or after ? and #."""
    return redaction.without_secrets(text, mark="")


def find(url: str) -> Source:
    """What the storage tells of the file at `url`, a URL or a path. Raises `UserError`."""
    fs, path = _client(url)
    address = without_secrets(url) if is_url(url) else str(Path(url).absolute())
    info = ask(address, lambda: fs.info(path))
    over_http = url.startswith(("http:", "https:"))
    name = PurePosixPath(unquote(urlsplit(url).path) if over_http else path).name
    if info.get("type") == "directory" or name in ("", ".", ".."):
        raise UserError(f"{address} is a folder", "Name one file: pack many into one HDF5 or tar file first.")
    if info.get("type") == "other":
        raise UserError(
            f"{address} is a FIFO, a device or a socket, and no file", "Name a file: of these no copy can be whole."
        )
    if info.get("size") is None:
        raise UserError(
            f"{address}: its server does not tell the size, so that a part cannot be told from the whole",
            "Serve it from a server that sends Content-Length.",
        )
    if _is_local(fs):
        _require_told_size(address, path, int(info["size"]))
    return Source(
        url=address,
        fs=fs,
        path=path,
        name=name,
        num_bytes=int(info["size"]),
        version=_version(info),
        in_ranges=not over_http or _gives_ranges(fs, path),
        sha256=_told_sha256(fs, path),
    )


def _is_local(fs: Any) -> bool:
    return "file" in ([fs.protocol] if isinstance(fs.protocol, str) else fs.protocol)


def _require_told_size(shown: str, path: str, num_bytes: int) -> None:
    """Raises `UserError` for a file that cannot be read, or that holds more than it tells, as those in /proc do."""
    try:
        with open(path, "rb") as file:
            more = not num_bytes and file.read(1)
    except OSError as error:
        raise UserError(f"{shown} cannot be read: {error.strerror}", "Ask its owner, or name another.") from None
    if more:
        raise UserError(f"{shown} says that it is empty, and is not", "Copy it with cat into a file, and name that.")


def _gives_ranges(fs: Any, path: str) -> bool:
    """Whether a web server gives a part of a file; many small ones do not, and none has to say so."""
    try:
        with fs.open(path, "rb", cache_type="none") as file:
            file.seek(1)
            return len(file.read(1)) == 1
    except Exception:  # noqa: BLE001  then it is read from start to end, and real trouble shows there
        return False


def open_span(source: Source) -> Any:
    """A file object for reading a span of the source, or all of it where it gives no ranges."""
    if not source.in_ranges:
        return source.fs.open(source.path, "rb", block_size=0)  # 0: one long answer, as it comes
    # WebHDFS reads ahead by a block, which a span does not need; the others know how to read without a cache.
    options = {"block_size": 1} if source.url.startswith("webhdfs:") else {"cache_type": "none"}
    return source.fs.open(source.path, "rb", **options)


def changed(source: Source) -> bool:
    """Whether the storage now tells another version than it did."""
    return _version(ask(source.url, lambda: source.fs.info(source.path))) != source.version


def _version(info: dict[str, Any]) -> dict[str, str]:
    return {key: str(info[key]) for key in _VERSION_KEYS if info.get(key)}


def _told_sha256(fs: Any, path: str) -> str | None:
    """The checksum in the file beside it, as `sha256sum NAME > NAME.sha256` writes it."""
    place, question, query = path.partition("?")
    try:
        if _is_local(fs) and not Path(f"{place}.sha256").is_file():  # a FIFO would be waited for
            return None
        with fs.open(f"{place}.sha256{question}{query}", "rb") as file:
            text = file.read(200).decode("ascii", "replace")  # whatever a server sends instead may be long
    except Exception:  # noqa: BLE001  most sources have none, and each client says so in its own way
        return None
    found = re.match(r"\\?([0-9a-fA-F]{64})\b", text)
    return found[1].lower() if found else None


def ask(shown: str, fn: Callable[[], T]) -> T:
    """fn's value; whatever a client raises becomes a UserError about `shown`."""
    try:
        return fn()
    except UserError:
        raise
    except FileNotFoundError as error:
        if is_gone(error):
            raise UserError(f"{shown} does not exist", "Check the path.") from None
        raise UserError(f"{shown}: {in_words(error)}", "Check the address, and that the server is up.") from None
    except Exception as error:  # noqa: BLE001  clients of many kinds of storage raise what they like
        raise UserError(f"{shown}: {in_words(error)}", "Check the address, and that the server is up.") from None


def is_gone(error: Exception) -> bool:
    """Whether a file is not there; fsspec's HTTP says FileNotFoundError also where no server answers."""
    cause = error.__cause__
    return isinstance(error, FileNotFoundError) and (cause is None or getattr(cause, "status", None) == 404)


def in_words(error: BaseException) -> str:
    if isinstance(error, FileNotFoundError) and error.__cause__ is not None:
        error = error.__cause__
    words = without_secrets(f"{type(error).__name__}: {error}".splitlines()[0])
    return words if len(words) < 300 else f"{words[:180]} ... {words[-100:]}"  # the cause may stand at either end


def _client(url: str) -> tuple[Any, str]:
    """fsspec's file system for `url`, and the file's path in it."""
    scheme = url.split("://")[0].lower() if is_url(url) else "file"
    client = _CLIENTS.get(scheme, scheme)
    options: dict[str, Any] = {"skip_instance_cache": True}
    try:
        from fsspec.core import url_to_fs

        if scheme in ("http", "https"):
            from aiohttp import ClientTimeout

            # Its own limit is 5 minutes a file. trust_env: compute nodes often reach the web through a proxy only.
            timeout = ClientTimeout(total=None, sock_connect=_CALL_TIMEOUT_S, sock_read=_CALL_TIMEOUT_S)
            options["client_kwargs"] = {"timeout": timeout, "trust_env": True}
        if scheme == "ftp":
            from fsspec.implementations.ftp import FTPFileSystem

            FTPFileSystem.ftp = SimpleNamespace(close=lambda: None)  # its destructor wants one where no server answered
        if scheme in ("hdfs", "viewfs"):
            import hdfs_native  # noqa: F401  without it fsspec takes a client that needs Java

            _require_namenode(url)
            # Its own limit is 60 s; then it reads on from another DataNode.
            options["dfs.client.socket-timeout"] = str(round(1000 * _DATANODE_TIMEOUT_S))
        fs, path = url_to_fs(url, **options)
    except ImportError as error:
        raise UserError(
            f"{scheme}:// needs {client}, which cannot be loaded ({error})", f"pip install {client}"
        ) from None
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001  clients take a part of a URL that is missing in many ways
        raise UserError(f"{without_secrets(url)}: {in_words(error)}", "Check the URL.") from None
    if scheme == "webhdfs":
        _make_strict(fs.session)
    return fs, path


def _require_namenode(url: str) -> None:
    """Raises `UserError` if nothing answers at the NameNode's address: hdfs-native would retry for three minutes, and
    no signal ends it meanwhile.
    """
    place = urlsplit(url)
    try:
        host, port = place.hostname or "", place.port or _NAMENODE_PORT
        socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, ValueError):
        return  # the name of a service, which only the client's configuration resolves
    try:
        socket.create_connection((host, port), timeout=_CALL_TIMEOUT_S / 2).close()
    except OSError as error:
        raise UserError(
            f"{without_secrets(url)}: no NameNode answers at {host}:{port}: {error}",
            "Check the address, and that HDFS is up.",
        ) from None


def _make_strict(session: Any) -> None:
    """fsspec's WebHDFS takes a DataNode's error page for the file's content, and waits without limit for an answer."""
    session.request = partial(session.request, timeout=_CALL_TIMEOUT_S)
    get = session.get

    def get_or_raise(*words: Any, **options: Any) -> Any:
        answer = get(*words, timeout=_DATANODE_TIMEOUT_S, **options)
        answer.raise_for_status()
        return answer

    session.get = get_or_raise


@contextmanager
def opened(url: str) -> Iterator[Any]:
    """The file at `url`, for reading; None where there is none. Raises `UserError` where that cannot be known."""
    fs, path = _client(url)
    shown = without_secrets(url)
    if not ask(shown, lambda: fs.exists(path)):
        yield None
        return
    with ask(shown, lambda: fs.open(path, "rb")) as file:
        # hdfs-native's object has a readinto that does not work: h5py must not see it.
        yield SimpleNamespace(read=file.read, seek=file.seek, tell=file.tell)


def upload(file: Path, url: str) -> None:
    """Writes `file` to `url`: temporary name, read back and compared, renamed; NAME.sha256 beside it.

    What had these names is replaced. Raises `UserError`.
    """
    fs, path = _client(url)
    ask(without_secrets(url), lambda: _upload(file, fs, path, without_secrets(url)))


def _rename(fs: Any, old: str, new: str) -> None:
    from fsspec import AbstractFileSystem

    if type(fs).mv is AbstractFileSystem.mv:  # S3 and its like have none: the server copies, and a copy appears whole
        fs.cp_file(old, new)
        fs.rm_file(old)
    else:
        fs.mv(old, new)


def _upload(file: Path, fs: Any, path: str, shown: str) -> None:
    folder, _, name = path.rpartition("/")
    unfinished = f"{folder}/.{name}.{uuid4().hex[:8]}.partial"
    written, found = sha256(), sha256()
    fs.makedirs(folder or "/", exist_ok=True)
    try:
        # To WebHDFS each block is an append of its own.
        options = {"block_size": 8 * _PIECE_BYTES} if "webhdfs" in fs.protocol else {}
        with file.open("rb") as local, fs.open(unfinished, "wb", **options) as remote:
            while data := local.read(_PIECE_BYTES):
                written.update(data)
                remote.write(data)
        with fs.open(unfinished, "rb") as remote:
            while data := remote.read(_PIECE_BYTES):
                found.update(data)
        if found.digest() != written.digest():
            raise UserError(
                f"{shown} does not read back as it was written", "Write it again, elsewhere if it happens twice."
            )
        for old in (f"{path}.sha256", path):
            if fs.exists(old):
                fs.rm_file(old)
        _rename(fs, unfinished, path)
        if fs.info(path)["size"] != file.stat().st_size:  # a rename that WebHDFS refuses is no error to fsspec
            raise UserError(f"{shown} did not get its name", "Write it again.")
        with fs.open(f"{path}.sha256", "wb") as remote:
            remote.write(f"{written.hexdigest()}  {name}\n".encode())
    finally:
        with suppress(Exception):  # the error that brought us here is the one to be told
            if fs.exists(unfinished):
                fs.rm_file(unfinished)
