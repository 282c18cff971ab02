"""setup.py compiles each file for its instruction set, and again only when something that matters changed."""

from __future__ import annotations

import ctypes
import importlib.util
import re
import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fastdeploy_dsa.ops import library
from tests.kit.headers import CLibrary, Headers

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


def cuda(build: ModuleType, *architectures: str) -> Any:
    return build.Cuda("nvcc", Path("/cuda"), "1", architectures)


@pytest.mark.parametrize(
    ("architectures", "name", "code"),
    [
        (("80", "90a"), "a.cu", ["compute_80,code=sm_80", "compute_90a,code=sm_90a", "compute_80,code=compute_80"]),
        (("80", "90a"), "a_sm90_rows.cu", ["compute_90a,code=sm_90a"]),
        (("80", "90a"), "a_sm90.cu", ["compute_90a,code=sm_90a"]),
        (("90a",), "a.cu", ["compute_90a,code=sm_90a"]),
        (("80", "89"), "a.cu", ["compute_80,code=sm_80", "compute_89,code=sm_89", "compute_89,code=compute_89"]),
        (("80", "89"), "a_sm90.cu", None),
    ],
)
def test_the_architectures_say_what_nvcc_generates(
    build: ModuleType, architectures: tuple[str, ...], name: str, code: list[str] | None
) -> None:
    flags = cuda(build, *architectures).code_flags(Path(name))
    assert flags == (code and tuple(f"-gencode=arch={one}" for one in code))


@pytest.mark.parametrize(("architectures", "has_sm90"), [(("80", "90a"), True), (("80",), False)])
def test_files_for_hopper_alone_come_with_the_macro_that_says_so(
    build: ModuleType, monkeypatch: pytest.MonkeyPatch, architectures: tuple[str, ...], has_sm90: bool
) -> None:
    monkeypatch.chdir(ROOT)
    units = build.cuda_units(cuda(build, *architectures))
    assert units
    assert all(f"-DDSA_HAS_SM90={int(has_sm90)}" in unit.command for unit in units)
    assert any("_sm90" in unit.source.stem for unit in units) == has_sm90


def test_only_the_common_file_and_the_bindings_know_of_cuda(
    build: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    units = build.kernel_units(is_x86=True, compiler_version="", cuda=cuda(build, "80"))
    assert [unit.source.name for unit in units if "-DDSA_WITH_CUDA" in unit.command] == ["common.cc"]
    # Objects of both kinds of build lie side by side.
    assert {unit.source.name for unit in units if unit.folder} == {"common.cc"}
    paddle = build.Paddle(Path("/paddle"), "1", has_cuda=False)
    bindings = build.binding_units(paddle, compiler_version="", cuda=cuda(build, "80"))
    assert all("-DDSA_WITH_CUDA" in unit.command and unit.folder for unit in bindings)


@pytest.mark.parametrize(
    ("wish", "paddle_has_cuda", "expected"),
    [("", True, True), ("", False, False), ("1", False, True), ("0", True, False)],
)
def test_cuda_kernels_are_built_for_a_paddle_with_cuda_or_on_demand(
    build: ModuleType, monkeypatch: pytest.MonkeyPatch, wish: str, paddle_has_cuda: bool, expected: bool
) -> None:
    monkeypatch.setenv("FASTDEPLOY_DSA_CUDA", wish)
    assert build.wants_cuda(build.Paddle(Path(), "1", has_cuda=paddle_has_cuda)) == expected
    assert build.wants_cuda(None) == (wish == "1")


@pytest.mark.parametrize(("version", "has_cuda"), [("'False'", False), ("'12.6'", True)])
def test_the_version_file_of_paddle_says_whether_it_has_cuda(
    build: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, version: str, has_cuda: bool
) -> None:
    header = tmp_path / "paddle" / "include" / "paddle" / "phi" / "api" / "all.h"
    for file, text in (
        (header, ""),
        (tmp_path / "paddle" / "version" / "__init__.py", f"full_version = '3.3.1'\ncuda_version = {version}\n"),
    ):
        file.parent.mkdir(parents=True)
        file.write_text(text)
    spec = ModuleSpec("paddle", None, is_package=True)
    spec.submodule_search_locations = [str(tmp_path / "paddle")]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    assert build.Paddle.find() == build.Paddle(tmp_path / "paddle", "3.3.1", has_cuda=has_cuda)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("NVCC", "/nowhere/nvcc", "/nowhere/nvcc was not found.*FASTDEPLOY_DSA_CUDA=0"),
        ("FASTDEPLOY_DSA_CUDA_ARCHITECTURES", "80;hopper", "ARCHITECTURES: expected .*got '80;hopper'"),
    ],
)
def test_what_is_wrong_with_a_cuda_build_is_one_sentence(
    build: ModuleType, monkeypatch: pytest.MonkeyPatch, name: str, value: str, words: str
) -> None:
    monkeypatch.setenv("NVCC", "true")
    monkeypatch.setenv(name, value)
    with pytest.raises(build.CompileError, match=words):
        build.Cuda.find()


def test_a_wish_that_is_neither_yes_nor_no_is_refused(build: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTDEPLOY_DSA_CUDA", "yes")
    with pytest.raises(build.CompileError, match="expected 0 or 1, got 'yes'"):
        build.wants_cuda(None)


@pytest.mark.parametrize(
    "note",
    [
        "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to x",
        "ptxas info    : (C7519) Potential Performance Loss",
        "ptxas info    : setmaxnreg ignored to maintain minimum register requirements",
    ],
)
def test_a_note_that_a_kernel_became_slow_is_an_error(build: ModuleType, note: str) -> None:
    with pytest.raises(build.CompileError, match="slow kernel"):
        build.run(("sh", "-c", f"echo '{note}' >&2"))
    build.run(("sh", "-c", "echo 'ptxas info    : Used 168 registers' >&2"))


_BUILT_BESIDE = ROOT / "build" / "cuda" / "fastdeploy_dsa" / "_lib" / library.C_LIBRARY.name
CUDA_LIBRARY = _BUILT_BESIDE if _BUILT_BESIDE.exists() else library.C_LIBRARY


def test_a_library_with_cuda_kernels_loads_without_a_gpu_and_has_every_function_of_the_headers() -> None:
    found = CLibrary(CUDA_LIBRARY)
    if not found.call("dsa_has_cuda"):
        pytest.skip("build with CUDA: FASTDEPLOY_DSA_CUDA=1 python setup.py build_ext --build-lib build/cuda")
    wanted = [name for name in found.headers.prototypes if re.search(r"_cuda(_workspace_bytes)?$", name)]
    assert {f"dsa_{op}_cuda" for op in library.OPS} <= set(wanted)
    for name in found.headers.prototypes:
        getattr(ctypes.CDLL(str(CUDA_LIBRARY)), name)
    no_device = found.headers.constants["DSA_CUDA_ERROR"] + 100
    assert found.status_text(no_device) == "no CUDA-capable device is detected"


def test_a_library_exports_the_functions_of_the_headers_and_nothing_else() -> None:
    for path in {CUDA_LIBRARY, library.C_LIBRARY}:
        listed = subprocess.run(
            ["nm", "-D", "--defined-only", str(path)], check=True, capture_output=True, text=True
        ).stdout
        exported = {line.split()[-1] for line in listed.splitlines()}
        assert exported <= set(Headers().prototypes)


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
