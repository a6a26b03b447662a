"""Generated kernels on disk: a cache that can only save time.

An entry is a Python file and a JSON file beside it that holds its checksum and what it was made for. Whatever is torn,
altered, another's, not this user's or not readable is ignored and written again. The folder is made for this user
alone; one that cannot be written, or that others may write, costs the time to generate.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import linecache
import logging
import os
import stat
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import cache
from importlib import metadata
from pathlib import Path
from types import ModuleType

LOG = logging.getLogger("attnc.cache")
LARGEST = 16 * 2**20  # bytes; a generated file is some ten kilobytes
ABANDONED = 3600.0  # seconds after which a temporary file has lost its writer

_modules: dict[str, ModuleType] = {}
_lock = threading.RLock()
_told: set[str] = set()


def cached_module(key: str, build: Callable[[], str]) -> ModuleType:
    """The module of a generated text: from this process, else from disk, else from `build()`.

    `key` names all that the text depends on (plan, device kind, element type ..); the versions of the compiler,
    torch and triton are added here. Its kernels are launchers (see `launcher`); its functions have their source at
    hand (`inspect.getsource`) whether or not a file could be written.
    """
    digest = _digest(key)
    with _lock:
        module = _modules.get(digest)
        if module is None:
            path = folder() / f"{digest}.py"
            text = _load(path, key)
            if text is None:
                text = build()
                _store(path, text, key)
            from attnc.runtime.cuda.launcher import Launchers  # late: it brings torch

            module = _modules[digest] = Launchers(_execute(path, text))
        return module


def kept(key: str) -> str | None:
    """The text that `keep` left under a key, by these versions, where it is whole and this user's own."""
    return _load(folder() / f"{_digest(key)}.txt", key)


def keep(key: str, text: str) -> None:
    """Leaves a text for later processes."""
    _store(folder() / f"{_digest(key)}.txt", text, key)


def folder() -> Path:
    """Where entries lie: ATTNC_CACHE_DIR, else the user's cache folder."""
    chosen = os.environ.get("ATTNC_CACHE_DIR")
    if chosen:
        return Path(chosen).absolute()
    from platformdirs import user_cache_path

    return user_cache_path("attnc")


@cache
def versions() -> dict[str, str]:
    """What a generated text depends on besides its pattern: the compiler's own sources, torch, triton, Python."""
    found = {"attnc": _compiler_digest(), "python": f"{sys.version_info.major}.{sys.version_info.minor}"}
    for name in ("torch", "triton"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "none"
    return found


def _compiler_digest() -> str:
    """Digest of the sources that decide what is generated, so that a changed compiler never meets its old output."""
    root = Path(__file__).parent.parent
    digest = hashlib.sha256()
    for path in sorted(path for part in ("dsl", "compiler", "runtime") for path in (root / part).rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _digest(key: str) -> str:
    return hashlib.sha256(json.dumps([key, versions()], sort_keys=True).encode()).hexdigest()[:40]


def _load(path: Path, key: str) -> str | None:
    """The text of an entry for `key` that is whole and this user's own, else None."""
    try:
        _require_private(path.parent)
        record = json.loads(_read_own(path.with_suffix(".json")))
        text = _read_own(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        _tell(f"ignored cache entry {path}: {error}")
        return None
    if not isinstance(record, dict) or record.get("sha256") != hashlib.sha256(text).hexdigest():
        _tell(f"ignored cache entry {path}: its checksum is another")
        return None
    if record.get("key") != key or record.get("versions") != versions():
        _tell(f"ignored cache entry {path}: it was made for something else")
        return None
    return text.decode()


def _require_private(directory: Path) -> None:
    """OSError for a folder that another user owns or may write: files there could be exchanged under their names."""
    status = directory.stat()
    if status.st_uid != os.geteuid() or status.st_mode & 0o022:
        raise OSError(f"another user owns {directory} or may write it")


def _read_own(path: Path) -> bytes:
    """Content of a plain file that this user owns and nobody else may write; OSError otherwise."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError("not a plain file")
        if status.st_uid != os.geteuid() or status.st_mode & 0o022:
            raise OSError("another user owns it or may write it")
        if status.st_size > LARGEST:
            raise OSError(f"longer than {LARGEST} bytes")
        return file.read(LARGEST)


def _store(path: Path, text: str, key: str) -> None:
    """Writes an entry, the text before its record, each at once; says so in one log line where it cannot."""
    content = text.encode()
    record = {"key": key, "sha256": hashlib.sha256(content).hexdigest(), "versions": versions()}
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _require_private(path.parent)
        _sweep(path.parent)
        _replace(path, content)
        _replace(path.with_suffix(".json"), json.dumps(record, indent=1).encode())
    except OSError as error:
        _tell(f"generated kernels are not kept in {path.parent}: {error}")


def _replace(path: Path, content: bytes) -> None:
    """Puts a whole file in place: readers see the old one or the new one. mkstemp makes it 0600."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, suffix=".part")
    try:
        with open(descriptor, "wb") as file:
            file.write(content)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def _sweep(directory: Path) -> None:
    """Removes what killed writers left behind."""
    for left in directory.glob("*.part"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > ABANDONED:
                left.unlink()


def _execute(path: Path, text: str) -> ModuleType:
    """A module from text. Its lines go to linecache, so that what `inspect` reads is what ran."""
    module = ModuleType(f"attnc_kernels_{path.stem}")
    module.__file__ = str(path)
    linecache.cache[str(path)] = (len(text), None, text.splitlines(keepends=True), str(path))
    sys.modules[module.__name__] = module  # inspect and pickling look functions up by their module
    try:
        exec(compile(text, str(path), "exec"), module.__dict__)
    except BaseException:
        del sys.modules[module.__name__]
        raise
    return module


def _tell(message: str) -> None:
    if message not in _told:
        _told.add(message)
        LOG.debug(message)
