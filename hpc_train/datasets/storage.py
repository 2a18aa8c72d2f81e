"""Files on web servers, HDFS, S3 and other disks, each through fsspec and its client."""

import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote, urlsplit
from uuid import uuid4

from hpc_train.core import redaction
from hpc_train.core.errors import UserError

_PIECE_BYTES = 8 << 20
_CALL_TIMEOUT_S = 30.0
_NAMENODE_PORT = 8020
_DATANODE_TIMEOUT_S = 20.0  # a third of `stage --wait`: after one that hangs there is time for another
_MAX_ERROR_LENGTH = 300
# A source that changes changes one of these; each kind of storage has some of them.
_VERSION_KEYS = ("ETag", "Last-Modified", "LastModified", "mtime", "modificationTime", "modification_time")
# The package of each scheme's client, if it has another name than the scheme.
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
    """A file as its storage describes it.

    url: without secrets. version: changes with the file. has_ranges: whether parts can be read; otherwise only the
    whole file from its start. sha256: None unless NAME.sha256 is beside it.
    """

    url: str
    fs: Any
    path: str
    name: str
    num_bytes: int
    version: dict[str, str]
    has_ranges: bool
    sha256: str | None

    def has_changed(self) -> bool:
        with client_errors(self.url):
            return _version(self.fs.info(self.path)) != self.version

    def read_range(self, start: int, end: int) -> bytes:
        """Raises whatever the client raises, and `EOFError` if bytes are missing."""
        options: dict[str, Any] = {}
        if self.url.startswith("webhdfs:"):
            options = {"block_size": 1}  # its file objects read ahead by a block
        elif not self.fs.async_impl:
            options = {"cache_type": "none"}
        data: bytes = self.fs.cat_file(self.path, start=start, end=end, **options)
        if len(data) != end - start:
            raise EOFError(f"{len(data):,} of {end - start:,} bytes came")
        return data

    def open_stream(self) -> Any:
        """A file object that reads from start to end: one long answer, as it comes."""
        return self.fs.open(self.path, "rb", block_size=0)


def is_url(text: str) -> bool:
    return "://" in text


def without_secrets(text: str) -> str:
    """`text` without the passwords and tokens that its URLs carry before the host or after ? and #."""
    return redaction.without_secrets(text, mark="")


@contextmanager
def client_errors(shown: str) -> Iterator[None]:
    """Turns whatever a client raises into a `UserError` about `shown`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001  each client has its own errors
        if is_missing(error):
            raise UserError(f"{shown} does not exist", "Check the path.") from None
        raise UserError(f"{shown}: {error_text(error)}", "Check the address, and that the server is up.") from None


def is_missing(error: Exception) -> bool:
    """Whether a file does not exist. fsspec's HTTP raises FileNotFoundError also if no server answers."""
    cause = error.__cause__
    return isinstance(error, FileNotFoundError) and (cause is None or getattr(cause, "status", None) == 404)


def error_text(error: BaseException) -> str:
    """An error in one line, without secrets."""
    if isinstance(error, FileNotFoundError) and error.__cause__ is not None:
        error = error.__cause__
    text = without_secrets(f"{type(error).__name__}: {error}".splitlines()[0])
    return text if len(text) < _MAX_ERROR_LENGTH else f"{text[:180]} ... {text[-100:]}"  # the cause may be at the end


# ------------------------------------------------------------------------------------- finding a file


def find(url: str) -> Source:
    """The file at `url`, a URL or a path, as its storage describes it. Raises `UserError`."""
    fs, path = _client(url)
    address = without_secrets(url) if is_url(url) else str(Path(url).absolute())
    with client_errors(address):
        info = fs.info(path)
    is_http = url.startswith(("http:", "https:"))
    name = PurePosixPath(unquote(urlsplit(url).path) if is_http else path).name
    if info.get("type") == "directory" or name in ("", ".", ".."):
        raise UserError(f"{address} is a folder", "Name one file: pack many into one HDF5 or tar file first.")
    if info.get("type") == "other":
        raise UserError(
            f"{address} is a FIFO, a device or a socket, and not a file",
            "Name a file: none of these can be copied completely.",
        )
    if info.get("size") is None:
        raise UserError(
            f"{address}: its server does not send the size, so that an incomplete copy would not be noticed",
            "Serve it from a server that sends Content-Length.",
        )
    if _is_local(fs):
        _require_true_size(address, path, int(info["size"]))
    return Source(
        url=address,
        fs=fs,
        path=path,
        name=name,
        num_bytes=int(info["size"]),
        version=_version(info),
        has_ranges=not is_http or _serves_ranges(fs, path),
        sha256=_published_sha256(fs, path),
    )


def _is_local(fs: Any) -> bool:
    return "file" in ([fs.protocol] if isinstance(fs.protocol, str) else fs.protocol)


def _require_true_size(shown: str, path: str, num_bytes: int) -> None:
    """Raises `UserError` for a file that cannot be read, or that claims to be empty and is not, as those in /proc."""
    try:
        with open(path, "rb") as file:
            has_more = not num_bytes and file.read(1)
    except OSError as error:
        raise UserError(f"{shown} cannot be read: {error.strerror}", "Ask its owner, or name another.") from None
    if has_more:
        raise UserError(f"{shown} says that it is empty, and is not", "Copy it with cat into a file, and name that.")


def _serves_ranges(fs: Any, path: str) -> bool:
    """Whether a web server sends a part of a file. Many small ones do not, and none has to say so."""
    try:
        with fs.open(path, "rb", cache_type="none") as file:
            file.seek(1)
            return len(file.read(1)) == 1
    except Exception:  # noqa: BLE001  then it is read from start to end, where any real trouble shows
        return False


def _version(info: dict[str, Any]) -> dict[str, str]:
    return {key: str(info[key]) for key in _VERSION_KEYS if info.get(key)}


def _published_sha256(fs: Any, path: str) -> str | None:
    """The checksum in the file beside it, as `sha256sum NAME > NAME.sha256` writes it."""
    file_path, question, query = path.partition("?")
    try:
        if _is_local(fs) and not Path(f"{file_path}.sha256").is_file():  # reading a FIFO would wait
            return None
        with fs.open(f"{file_path}.sha256{question}{query}", "rb") as file:
            text = file.read(200).decode("ascii", "replace")  # a server may send a long page instead
    except Exception:  # noqa: BLE001  most sources have none, and each client raises its own error
        return None
    found = re.match(r"\\?([0-9a-fA-F]{64})\b", text)
    return found[1].lower() if found else None


# ------------------------------------------------------------------------------------- clients


def _client(url: str) -> tuple[Any, str]:
    """fsspec's file system for `url`, and the file's path in it."""
    scheme = url.split("://")[0].lower() if is_url(url) else "file"
    try:
        return _open_client(url, scheme)
    except ImportError as error:
        client = _CLIENTS.get(scheme, scheme)
        raise UserError(
            f"{scheme}:// needs {client}, which cannot be loaded ({error})", f"pip install {client}"
        ) from None
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001  each client raises its own error for a part of a URL that is missing
        raise UserError(f"{without_secrets(url)}: {error_text(error)}", "Check the URL.") from None


def _open_client(url: str, scheme: str) -> tuple[Any, str]:
    from fsspec.core import url_to_fs

    options: dict[str, Any] = {"skip_instance_cache": True}
    if scheme in ("http", "https"):
        from aiohttp import ClientTimeout

        # aiohttp's own limit is 5 minutes a file. trust_env: compute nodes often reach the web only through a proxy.
        timeout = ClientTimeout(total=None, sock_connect=_CALL_TIMEOUT_S, sock_read=_CALL_TIMEOUT_S)
        options["client_kwargs"] = {"timeout": timeout, "trust_env": True}
    if scheme == "ftp":
        from fsspec.implementations.ftp import FTPFileSystem

        # Its destructor closes `ftp`, which is missing if no server answered.
        FTPFileSystem.ftp = SimpleNamespace(close=lambda: None)
    if scheme in ("hdfs", "viewfs"):
        import hdfs_native  # noqa: F401  without it fsspec takes a client that needs Java

        _require_namenode(url)
        # Its own limit is 60 s; after it, it reads on from another DataNode.
        options["dfs.client.socket-timeout"] = str(round(1000 * _DATANODE_TIMEOUT_S))
    fs, path = url_to_fs(url, **options)
    if scheme == "webhdfs":
        _raise_http_errors(fs.session)
    return fs, path


def _require_namenode(url: str) -> None:
    """Raises `UserError` if nothing answers at the NameNode's address.

    hdfs-native would retry for three minutes, and no signal ends it meanwhile.
    """
    parts = urlsplit(url)
    try:
        host, port = parts.hostname or "", parts.port or _NAMENODE_PORT
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


def _raise_http_errors(session: Any) -> None:
    """fsspec's WebHDFS takes a DataNode's error page for the file's content, and waits for an answer without limit."""
    session.request = partial(session.request, timeout=_CALL_TIMEOUT_S)
    get = session.get

    def get_or_raise(*args: Any, **options: Any) -> Any:
        answer = get(*args, timeout=_DATANODE_TIMEOUT_S, **options)
        answer.raise_for_status()
        return answer

    session.get = get_or_raise


# ------------------------------------------------------------------------------------- reading and writing


@contextmanager
def opened(url: str) -> Iterator[Any]:
    """The file at `url` for reading; None if it does not exist. Raises `UserError` if that is unknown."""
    fs, path = _client(url)
    with client_errors(without_secrets(url)):
        file = fs.open(path, "rb") if fs.exists(path) else None
    if file is None:
        yield None
        return
    with file:
        # hdfs-native's object has a readinto that does not work: h5py must not see it.
        yield SimpleNamespace(read=file.read, seek=file.seek, tell=file.tell)


def upload(file: Path, url: str) -> None:
    """Writes `file` to `url`: temporary name, read back and compared, renamed; NAME.sha256 beside it.

    Replaces files of these names. Raises `UserError`.
    """
    fs, path = _client(url)
    shown = without_secrets(url)
    folder, _, name = path.rpartition("/")
    partial_path = f"{folder}/.{name}.{uuid4().hex[:8]}.partial"
    with client_errors(shown):
        try:
            fs.makedirs(folder or "/", exist_ok=True)
            checksum = _copy_to(fs, file, partial_path)
            if _sha256_of(fs, partial_path) != checksum:
                remedy = "Write it again, elsewhere if it happens twice."
                raise UserError(f"{shown} does not read back as it was written", remedy)
            for old in (f"{path}.sha256", path):
                if fs.exists(old):
                    fs.rm_file(old)
            _rename(fs, partial_path, path)
            if fs.info(path)["size"] != file.stat().st_size:  # fsspec does not notice a rename that WebHDFS refuses
                raise UserError(f"{shown} did not get its name", "Write it again.")
            with fs.open(f"{path}.sha256", "wb") as remote:
                remote.write(f"{checksum}  {name}\n".encode())
        finally:
            with suppress(Exception):  # the error that led here is the one to show
                if fs.exists(partial_path):
                    fs.rm_file(partial_path)


def _copy_to(fs: Any, file: Path, path: str) -> str:
    """The sha256 of what was written."""
    written = sha256()
    # To WebHDFS each block is an append of its own.
    options = {"block_size": 8 * _PIECE_BYTES} if "webhdfs" in fs.protocol else {}
    with file.open("rb") as local, fs.open(path, "wb", **options) as remote:
        while data := local.read(_PIECE_BYTES):
            written.update(data)
            remote.write(data)
    return written.hexdigest()


def _sha256_of(fs: Any, path: str) -> str:
    found = sha256()
    with fs.open(path, "rb") as remote:
        while data := remote.read(_PIECE_BYTES):
            found.update(data)
    return found.hexdigest()


def _rename(fs: Any, old: str, new: str) -> None:
    from fsspec import AbstractFileSystem

    if type(fs).mv is AbstractFileSystem.mv:  # S3 and others cannot rename: the server copies, and a copy is atomic
        fs.cp_file(old, new)
        fs.rm_file(old)
    else:
        fs.mv(old, new)
