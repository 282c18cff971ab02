"""setup.py compiles each file for its instruction set, and again only when something that matters changed."""

from __future__ import annotations

import ctypes
import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from fastdeploy_dsa.ops import library

ROOT = Path(__file__).resolve().parent.parent
HEADERS = sorted((ROOT / "custom_ops" / "include" / "dsa").glob("*.h"))


@pytest.fixture(scope="module")
def build() -> ModuleType:
    """setup.py as a module; it builds only when it is run."""
    spec = importlib.util.spec_from_file_location("build_of_fastdeploy_dsa", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


class Project:
    """A source and a header in a folder of their own."""

    def __init__(self, build: ModuleType, folder: Path) -> None:
        self._build = build
        self.header = folder / "answer.h"
        self.source = folder / "answer.cc"
        self.header.write_text("enum { ANSWER = 1 };\n")
        self.source.write_text('#include "answer.h"\nint answer() { return ANSWER; }\n')
        self.store = build.ObjectStore(folder / "objects")

    def unit(self, *flags: str) -> object:
        return self._build.Unit(self.source, (*self._build.compiler(), "-I.", *flags), identity=" ".join(flags))


@pytest.fixture
def project(build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    monkeypatch.chdir(tmp_path)
    project = Project(build, Path())
    project.store.compile(project.unit())
    return project


def test_an_object_stays_when_only_times_changed(project: Project) -> None:
    project.header.touch()
    project.source.touch()
    assert project.store.is_current(project.unit())


@pytest.mark.parametrize("name", ["header", "source"])
def test_an_object_is_stale_when_a_file_changed(project: Project, name: str) -> None:
    path = getattr(project, name)
    path.write_text(path.read_text() + "\n")
    assert not project.store.is_current(project.unit())


def test_an_object_is_stale_when_flags_changed(project: Project) -> None:
    assert not project.store.is_current(project.unit("-O1"))


def test_an_object_is_stale_when_a_header_is_gone(project: Project) -> None:
    project.header.unlink()
    assert not project.store.is_current(project.unit())


def test_a_compiler_error_is_shown_and_leaves_no_current_object(build: ModuleType, project: Project) -> None:
    project.source.write_text("int answer() { return nothing; }\n")
    with pytest.raises(build.CompileError, match="nothing"):
        project.store.compile(project.unit())
    assert not project.store.is_current(project.unit())


@pytest.mark.parametrize(
    ("name", "suffix"),
    [("a.cc", None), ("a_avx2.cc", "_avx2"), ("a_avx512.cc", "_avx512"), ("a_avx512_bf16.cc", "_avx512_bf16")],
)
def test_the_end_of_a_name_says_the_instruction_set(build: ModuleType, name: str, suffix: str | None) -> None:
    assert build.instruction_set(Path(name)) == suffix


def test_vector_files_are_left_out_elsewhere_than_on_x86(build: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    everywhere = build.kernel_units(is_x86=False, compiler_version="")
    on_x86 = build.kernel_units(is_x86=True, compiler_version="")
    assert {build.instruction_set(unit.source) for unit in everywhere} == {None}
    assert {unit.source for unit in everywhere} < {unit.source for unit in on_x86}


def test_plain_files_link_without_the_vector_files(build: ModuleType, tmp_path: Path) -> None:
    """As on a processor that is not x86-64: every mention of a vector file's function stands inside #if DSA_X86."""
    plain = [str(path) for path in (ROOT / "custom_ops" / "cpu").glob("*.cc") if not build.instruction_set(path)]
    flags = ["-std=c++17", "-O0", "-fPIC", "-fopenmp", "-shared", "-DDSA_X86=0", "-Wl,--no-undefined"]
    includes = [f"-I{ROOT / 'custom_ops' / 'include'}", f"-I{ROOT / 'custom_ops' / 'cpu'}"]
    command = [*build.compiler(), *flags, *includes, *plain, "-o", str(tmp_path / "plain.so")]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    undefined = sorted(set(re.findall(r"undefined reference to [`'](.*?)'", done.stderr)))
    assert undefined == []
    assert done.returncode == 0, done.stderr


def test_objects_for_an_instruction_set_lend_no_function_to_others() -> None:
    """A weak symbol, from an inline function or a template, may replace the same one in plain files at link time."""
    objects = sorted((ROOT / "build" / "objects" / "custom_ops" / "cpu").glob("*_avx*.o"))
    assert objects, "the tests run against a build of this checkout: python setup.py build_ext --inplace"
    symbols = subprocess.run(["nm", "-A", *map(str, objects)], check=True, capture_output=True, text=True).stdout
    assert [line for line in symbols.splitlines() if line.split()[-2] in {"W", "V", "u"}] == []


@pytest.mark.parametrize("header", HEADERS, ids=lambda path: path.name)
def test_a_header_is_clean_c11_by_itself(header: Path) -> None:
    command = ["cc", "-std=c11", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-fsyntax-only", "-x", "c"]
    done = subprocess.run(
        [*command, f"-I{header.parent.parent}", str(header)], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_the_c_library_loads_without_paddle() -> None:
    needed = subprocess.run(["ldd", str(library.C_LIBRARY)], check=True, capture_output=True, text=True).stdout
    assert "paddle" not in needed.replace(str(ROOT), "")
    assert ctypes.CDLL(str(library.C_LIBRARY)).dsa_cpu_isa() > 0
