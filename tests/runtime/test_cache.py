"""The disk cache can only save time: whatever is wrong with an entry or the folder, the right kernel comes out."""

from __future__ import annotations

import inspect
import json
import logging
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from attnc.runtime import cache

TEXT = "def answer():\n    return {}\n"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ATTNC_CACHE_DIR", str(tmp_path / "kernels"))
    forget(monkeypatch)
    return tmp_path / "kernels"


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """What another process would know: nothing but the disk."""
    monkeypatch.setattr(cache, "_modules", {})
    monkeypatch.setattr(cache, "_told", set())


def answer(key: str, value: int) -> int:
    """The value that the module of `key` holds, were it built now with `value`."""
    result = cache.cached_module(key, lambda: TEXT.format(value)).answer()
    assert isinstance(result, int)
    return result


def files(folder: Path, suffix: str) -> list[Path]:
    return sorted(folder.glob(f"*{suffix}"))


def test_a_text_is_built_once_a_process() -> None:
    built: list[int] = []

    def build() -> str:
        built.append(1)
        return TEXT.format(1)

    assert cache.cached_module("key", build) is cache.cached_module("key", build)
    assert len(built) == 1


def test_another_process_reads_the_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    assert answer("key", 1) == 1
    forget(monkeypatch)
    assert answer("key", 2) == 1
    assert answer("another key", 3) == 3


def test_another_version_of_the_compiler_builds_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    assert answer("key", 1) == 1
    forget(monkeypatch)
    monkeypatch.setattr(cache, "versions", lambda: {"attnc": "another"})
    assert answer("key", 2) == 2


def test_only_its_owner_may_read_the_folder_and_its_files(folder: Path) -> None:
    answer("key", 1)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}


def test_functions_have_their_source(folder: Path) -> None:
    module = cache.cached_module("key", lambda: TEXT.format(7))
    files(folder, ".py")[0].unlink()
    assert inspect.getsource(module.answer) == TEXT.format(7)


def pipe(code: Path, record: Path) -> None:
    code.unlink()
    os.mkfifo(code)


@pytest.mark.parametrize(
    "damage",
    [
        lambda code, record: code.write_text("def answer():\n    return 666\n"),
        lambda code, record: code.write_bytes(code.read_bytes()[:10]),
        lambda code, record: code.write_bytes(b""),
        lambda code, record: code.unlink(),
        lambda code, record: record.write_text(record.read_text()[:20]),
        lambda code, record: record.write_text("[]"),
        lambda code, record: record.write_bytes(b"\xff\xfe"),
        lambda code, record: record.write_text(json.dumps({"sha256": "0"})),
        lambda code, record: record.unlink(),
        lambda code, record: code.chmod(0o666),
        lambda code, record: (code.rename(code.with_suffix(".real")), code.symlink_to(code.with_suffix(".real"))),
        pipe,
    ],
    ids=[
        "changed", "torn", "empty", "no-text", "torn-record", "list-record", "binary-record", "other-checksum",
        "no-record", "writable-by-all", "symlink", "pipe",
    ],
)  # fmt: skip
def test_a_bad_entry_is_built_again(folder: Path, monkeypatch: pytest.MonkeyPatch, damage: object) -> None:
    assert answer("key", 1) == 1
    assert callable(damage)
    damage(files(folder, ".py")[0], files(folder, ".json")[0])
    forget(monkeypatch)
    assert answer("key", 2) == 2
    forget(monkeypatch)
    assert answer("key", 3) == 2, "the new entry is whole"


def test_a_file_of_another_user_is_ignored(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert answer("key", 1) == 1
    forget(monkeypatch)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    assert answer("key", 2) == 2


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o1777])
def test_a_folder_that_others_may_write_is_not_used(folder: Path, monkeypatch: pytest.MonkeyPatch, mode: int) -> None:
    assert answer("key", 1) == 1
    folder.chmod(mode)
    forget(monkeypatch)
    assert answer("key", 2) == 2
    assert answer("another", 3) == 3
    assert len(files(folder, ".py")) == 1


def test_an_entry_under_the_name_of_another_is_ignored(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert answer("key", 1) == 1
    (code,), (record,) = files(folder, ".py"), files(folder, ".json")
    assert answer("another", 2) == 2
    for other in (code, record):
        (target,) = {*files(folder, other.suffix)} - {other}
        other.replace(target)
    forget(monkeypatch)
    assert answer("another", 3) == 3


def test_a_directory_in_the_way_costs_only_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer("key", 1)
    path = files(folder, ".py")[0]
    path.unlink()
    path.mkdir()
    forget(monkeypatch)
    assert answer("key", 2) == 2
    assert not files(folder, ".part")


def test_a_disk_without_room_costs_only_time(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(source: object, target: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with caplog.at_level(logging.DEBUG, "attnc.cache"):
        assert answer("key", 1) == 1
        assert answer("another", 2) == 2
    assert len([record for record in caplog.records if "No space left" in record.message]) == 1
    assert list(folder.iterdir()) == [], "nothing partial stays"


def test_a_folder_that_cannot_be_made_costs_only_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ATTNC_CACHE_DIR", str(tmp_path / "file" / "kernels"))
    assert answer("key", 1) == 1


def test_a_text_that_does_not_run_leaves_no_module(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ZeroDivisionError):
        cache.cached_module("key", lambda: "1 / 0\n")
    assert not [name for name in sys.modules if name.startswith("attnc_kernels_") and "key" in name]


def test_what_killed_writers_left_is_removed(folder: Path) -> None:
    folder.mkdir()
    old, new = folder / "old.part", folder / "new.part"
    old.touch()
    new.touch()
    os.utime(old, (0, 0))
    answer("key", 1)
    assert files(folder, ".part") == [new]


PROGRAM = """
from attnc.runtime.cache import cached_module
text = "def answer():\\n    return 41\\n" + "# filling\\n" * 20000
for n in range(20):
    assert cached_module(f"key {n}", lambda: text).answer() == 41
"""


@pytest.mark.slow
def test_twenty_processes_at_once(folder: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    started = [subprocess.Popen([sys.executable, "-c", PROGRAM], env=environment) for _ in range(20)]
    assert [process.wait(120) for process in started] == [0] * 20
    assert len(files(folder, ".py")) == len(files(folder, ".json")) == 20
    assert not files(folder, ".part")
