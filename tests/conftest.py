"""The `golden` fixture, and how hypothesis runs here.

Golden text is compared with a file kept beside the tests. `pytest --update-golden` writes the files anew, and removes
those that no test asks for. A busy machine is no error: examples have no deadline, and may be drawn slowly.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile("suite", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("suite")

TESTS = Path(__file__).parent
GOLDEN = TESTS / "golden"
_wanted = pytest.StashKey[set[Path]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write the golden files instead of comparing")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_wanted] = set()
    marks = config.getoption("markexpr")
    if "gpu" not in marks or "not gpu" in marks:
        # Triton decides when it is imported: here the generated kernels run in its interpreter.
        os.environ.setdefault("TRITON_INTERPRET", "1")
    if config.getoption("--update-golden") and os.environ.get("CI"):
        raise pytest.UsageError("--update-golden is refused where CI is set: golden files are reviewed, then committed")


def golden_path(item: pytest.Item) -> Path:
    """tests/golden/<path of the test file>/<name of the test>.txt"""
    folder = GOLDEN / item.path.relative_to(TESTS).with_suffix("")
    return folder / (re.sub(r"[^\w.-]+", "-", item.name).strip("-") + ".txt")


def _note(config: pytest.Config, items: list[pytest.Item]) -> None:
    config.stash[_wanted] |= {golden_path(item) for item in items if "golden" in getattr(item, "fixturenames", ())}


def pytest_deselected(items: list[pytest.Item]) -> None:
    if items:
        _note(items[0].config, list(items))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Fail on golden files of the collected test files, or of test files that are gone, that no test asks for."""
    config = session.config
    _note(config, session.items)
    wanted = config.stash[_wanted]
    if any("::" in argument for argument in config.args):
        return  # parts of files: the rest was not collected
    collected = {path.parent for path in wanted}
    kept = {GOLDEN / test.relative_to(TESTS).with_suffix("") for test in TESTS.rglob("test_*.py")}
    unused = [
        path
        for path in sorted(GOLDEN.rglob("*.txt"))
        if path not in wanted and (path.parent in collected or path.parent not in kept)
    ]
    if config.getoption("--update-golden"):
        for path in unused:
            path.unlink()
    elif unused:
        raise pytest.UsageError("golden files that no test asks for: " + ", ".join(map(str, unused)))


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Compare a text with the test's golden file (one a test)."""
    path = golden_path(request.node)

    def check(text: str) -> None:
        text = text.rstrip("\n") + "\n"
        if request.config.getoption("--update-golden"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, "utf-8")
        assert path.exists(), f"{path} is missing: review and keep the output of `pytest --update-golden`"
        assert text == path.read_text("utf-8")

    return check
