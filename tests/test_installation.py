"""What `fastdeploy-dsa check` says, for installations that are whole and broken in one place each."""

from __future__ import annotations

import os
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from fastdeploy_dsa import installation
from fastdeploy_dsa.installation import Finding, LibraryFile, Observations
from fastdeploy_dsa.ops import library

VERSIONS = dict.fromkeys((*installation.CORE_DISTRIBUTIONS, *installation.SERVER_DISTRIBUTIONS, "paddlepaddle"), "1.0")
WHOLE = Observations(
    versions=VERSIONS,
    c_library=LibraryFile(path=Path("_lib/c.so"), exists=True),
    paddle_library=LibraryFile(path=Path("_lib/paddle.so"), exists=True),
    paddle_version="3.3.1",
    registered_ops=frozenset(f"dsa_{op}" for op in library.OPS),
    cpu_isa="avx2",
    num_cpus=4,
    has_demo_model=True,
)
ABSENT = LibraryFile(path=Path("_lib/absent.so"), exists=False)
STALE = LibraryFile(path=Path("_lib/stale.so"), exists=True, newer_sources=("cpu/a.cc", "cpu/b.cc"))

# What is broken, and the words that the line about it must contain.
STOPPING = {
    "a package is absent": (
        replace(WHOLE, versions={name: "1.0" for name in VERSIONS if name != "tokenizers"}),
        "tokenizers",
    ),
    "paddle is absent": (
        replace(WHOLE, paddle_version="", paddle_error="No module named 'paddle'"),
        "No module named",
    ),
    "the C library was not built": (replace(WHOLE, c_library=ABSENT), "absent.so was not built"),
    "the C library does not load": (replace(WHOLE, c_library_error="bad ELF"), "does not load: bad ELF"),
    "the op library was not built": (replace(WHOLE, paddle_library=ABSENT), "absent.so was not built"),
    "the op library does not load": (replace(WHOLE, ops_error="undefined symbol"), "undefined symbol"),
    "an op is not registered": (
        replace(WHOLE, registered_ops=WHOLE.registered_ops - {"dsa_sparse_mla"}),
        "without sparse_mla",
    ),
    "the instruction set is unknown": (replace(WHOLE, cpu_isa=""), "unknown"),
}
HARMLESS = {
    "a library is older than its sources": (replace(WHOLE, c_library=STALE), "older than cpu/a.cc and 1 more"),
    "two paddles are installed": (
        replace(WHOLE, versions={**VERSIONS, "paddlepaddle-gpu": "1.0"}),
        "installed over each other",
    ),
    "a driver does not answer": (replace(WHOLE, has_cuda_build=True, gpu_error="no device"), "no device"),
    "GPUs are there": (replace(WHOLE, has_cuda_build=True, num_gpus=2), "2 visible"),
    "the server's packages are absent": (
        replace(WHOLE, versions={name: "1.0" for name in VERSIONS if name not in {"starlette", "prometheus-client"}}),
        "needs prometheus-client, starlette;",
    ),
    "the demo model is absent": (replace(WHOLE, has_demo_model=False), "not in the package"),
}


def lines_with(words: str, findings: list[Finding]) -> list[Finding]:
    return [finding for finding in findings if words in finding.detail]


def test_a_whole_installation_has_nothing_missing() -> None:
    findings = installation.judge(WHOLE)
    assert [finding.name for finding in findings if finding.status == "missing"] == []
    assert installation.exit_status(findings) == 0


@pytest.mark.parametrize("case", STOPPING)
def test_what_stops_the_cpu_path_is_missing_and_has_a_remedy(case: str) -> None:
    seen, words = STOPPING[case]
    findings = installation.judge(seen)
    (finding,) = lines_with(words, findings)
    assert finding.status == "missing"
    assert finding.remedy != ""
    assert installation.exit_status(findings) == 1


@pytest.mark.parametrize("case", HARMLESS)
def test_what_stops_nothing_is_a_note(case: str) -> None:
    seen, words = HARMLESS[case]
    findings = installation.judge(seen)
    (finding,) = lines_with(words, findings)
    assert finding.status == "note"
    assert installation.exit_status(findings) == 0


def test_the_server_is_reported_with_its_versions_or_the_command_that_installs_it() -> None:
    with_it, without = (
        next(finding for finding in installation.judge(seen) if finding.name == "HTTP server (optional)")
        for seen in (WHOLE, HARMLESS["the server's packages are absent"][0])
    )
    assert (with_it.status, with_it.remedy) == ("ok", "")
    assert "uvicorn 1.0" in with_it.detail
    assert without.remedy == library.install_remedy("server")


def test_the_servers_packages_are_those_of_the_extra() -> None:
    text = (Path(__file__).resolve().parent.parent / "pyproject.toml").read_text(encoding="utf-8")
    (extra,) = re.findall(r"^server = \[(.*)\]", text, re.MULTILINE)
    assert tuple(re.findall(r'"([\w-]+)>', extra)) == installation.SERVER_DISTRIBUTIONS


def test_every_breakage_is_reported_at_once() -> None:
    broken = Observations(versions={}, c_library=ABSENT, paddle_library=ABSENT, paddle_error="none")
    missing = {finding.name for finding in installation.judge(broken) if finding.status == "missing"}
    expected = {"Python packages", "PaddlePaddle", "C library", "Paddle ops", "Registered ops", "Processor"}
    assert missing == expected


def test_newer_sources_names_only_files_changed_after_the_build(tmp_path: Path) -> None:
    built, old, new, other = (tmp_path / name for name in ("lib.so", "old.cc", "new.h", "notes.md"))
    for path, age in ((built, 100), (old, 50), (new, 200), (other, 200)):
        path.touch()
        os.utime(path, (age, age))
    assert installation.newer_sources(built, tmp_path) == ("new.h",)


def test_newer_sources_is_empty_without_a_source_checkout(tmp_path: Path) -> None:
    built = tmp_path / "lib.so"
    built.touch()
    assert installation.newer_sources(built, tmp_path / "absent") == ()


def test_observe_library_of_a_missing_file_is_absent(tmp_path: Path) -> None:
    assert not installation.observe_library(tmp_path / "absent.so", tmp_path).exists


def test_cpu_isa_of_something_that_is_no_library_raises_oserror(tmp_path: Path) -> None:
    fake = tmp_path / "fake.so"
    fake.write_text("not a library")
    with pytest.raises(OSError, match=r"fake\.so"):
        installation.cpu_isa(fake)


def test_this_installation_works() -> None:
    findings = installation.check_installation()
    assert [finding for finding in findings if finding.status == "missing"] == []


def test_render_shows_every_finding_with_its_remedy_unchanged() -> None:
    console = Console(width=200, record=True, file=open(os.devnull, "w"))  # noqa: SIM115 - lives as long as the test
    findings = installation.judge(replace(WHOLE, c_library=ABSENT))
    installation.render(findings, console)
    text = console.export_text()
    for finding in findings:
        assert finding.name in text
        assert finding.remedy in text
    assert "does not work" in text


def test_loading_without_paddle_names_the_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "paddle.base", None)
    with pytest.raises(ImportError, match=r"PaddlePaddle.*pip install -e '\.\[cpu\]'"):
        library.load_paddle_ops(tmp_path / "any.so")


def test_loading_an_absent_library_names_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(ImportError, match=r"absent\.so is missing.*pip install -e '\.\[cpu\]'"):
        library.load_paddle_ops(tmp_path / "absent.so")


def test_loading_something_that_is_no_library_names_the_remedy(tmp_path: Path) -> None:
    fake = tmp_path / "fake.so"
    fake.write_text("not a library")
    with pytest.raises(ImportError, match=r"fake\.so does not load[\s\S]*pip install -e '\.\[cpu\]'"):
        library.load_paddle_ops(fake)
