"""The golden fixture of conftest.py, in test suites of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest_plugins = ["pytester"]

TEST = """
import pytest
@pytest.mark.parametrize("text", ["a", "b c"])
def test_text(text, golden):
    golden(text)
"""


@pytest.fixture
def suite(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # every run would import them anew
    pytester.makeconftest(Path(__file__).with_name("conftest.py").read_text("utf-8"))
    pytester.makepyfile(test_suite=TEST)
    pytester.runpytest_inprocess("--update-golden").assert_outcomes(passed=2)
    return pytester


def test_a_text_equals_its_file(suite: pytest.Pytester) -> None:
    assert sorted(path.name for path in suite.path.glob("golden/test_suite/*")) == [
        "test_text-a.txt",
        "test_text-b-c.txt",
    ]
    suite.runpytest_inprocess().assert_outcomes(passed=2)


def test_a_changed_text_fails(suite: pytest.Pytester) -> None:
    (suite.path / "golden/test_suite/test_text-a.txt").write_text("other\n")
    suite.runpytest_inprocess().assert_outcomes(passed=1, failed=1)


def test_a_missing_file_fails(suite: pytest.Pytester) -> None:
    (suite.path / "golden/test_suite/test_text-a.txt").unlink()
    suite.runpytest_inprocess().assert_outcomes(passed=1, failed=1)
    assert not (suite.path / "golden/test_suite/test_text-a.txt").exists()


@pytest.mark.parametrize("unused", ["test_suite/test_gone.txt", "test_gone/test_text.txt"])
def test_a_file_that_no_test_asks_for_fails_the_run(suite: pytest.Pytester, unused: str) -> None:
    path = suite.path / "golden" / unused
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n")
    assert suite.runpytest_inprocess().ret == pytest.ExitCode.USAGE_ERROR
    assert suite.runpytest_inprocess("-k", "a]").ret == pytest.ExitCode.USAGE_ERROR
    assert suite.runpytest_inprocess("--update-golden").ret == pytest.ExitCode.OK
    assert not path.exists()


def test_deselected_tests_keep_their_files(suite: pytest.Pytester) -> None:
    suite.runpytest_inprocess("-k", "a]").assert_outcomes(passed=1, deselected=1)
    suite.runpytest_inprocess("test_suite.py::test_text[a]").assert_outcomes(passed=1)


def test_updating_is_refused_where_ci_is_set(suite: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "true")
    assert suite.runpytest_inprocess("--update-golden").ret == pytest.ExitCode.USAGE_ERROR
