"""The progress bar shows itself on stderr only, only when it is wanted, and only for long work."""

from __future__ import annotations

import pytest

from fastdeploy_dsa.engine import progress
from fastdeploy_dsa.engine.progress import ProgressBar


def shown(capsys: pytest.CaptureFixture[str], *, is_wanted: bool | None) -> str:
    with ProgressBar("counting", 4, is_wanted=is_wanted) as bar:
        for done in range(4):
            bar.update(done + 1)
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


@pytest.fixture
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_DELAY_SECONDS", 0.0)
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_UPDATES", 0.0)


@pytest.mark.usefixtures("_at_once")
def test_a_bar_that_is_asked_for_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert "counting" in shown(capsys, is_wanted=True)


@pytest.mark.usefixtures("_at_once")
@pytest.mark.parametrize("is_wanted", [None, False])
def test_without_a_terminal_or_when_refused_there_is_none(
    capsys: pytest.CaptureFixture[str], is_wanted: bool | None
) -> None:
    assert shown(capsys, is_wanted=is_wanted) == ""


def test_short_work_shows_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert shown(capsys, is_wanted=True) == ""
