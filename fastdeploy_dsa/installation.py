"""The report behind `fastdeploy-dsa check`: what is built, what the machine offers, what is missing, how to get it.

Looking (`observe`) and judging (`judge`) are apart: judging is a pure function of what was seen.
"""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import import_module, metadata
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rich.markup import escape
from rich.table import Table

from fastdeploy_dsa.ops.library import C_LIBRARY, INSTALL_REMEDY, OPS, PADDLE_LIBRARY, install_remedy, load_paddle_ops
from fastdeploy_dsa.ops.types import ISA_CODES

if TYPE_CHECKING:
    from rich.console import Console

PACKAGE = Path(__file__).resolve().parent
DEMO_MODEL = PACKAGE / "demo_model"
# Present beside the package in a source checkout only.
SOURCES = PACKAGE.parent / "custom_ops"

CORE_DISTRIBUTIONS = ("numpy", "PyYAML", "rich", "safetensors", "tokenizers")
PADDLE_DISTRIBUTIONS = ("paddlepaddle", "paddlepaddle-gpu")
# Of the extra `server`.
SERVER_DISTRIBUTIONS = ("jinja2", "prometheus-client", "pydantic", "starlette", "uvicorn")

Status = Literal["ok", "missing", "note"]


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        name: What was looked at.
        status: "missing" means that the CPU path does not work; "note" is worth knowing and stops nothing.
        detail: What was found.
        remedy: A command or a sentence that changes it; empty when there is nothing to change.
    """

    name: str
    status: Status
    detail: str
    remedy: str = ""


@dataclass(frozen=True)
class LibraryFile:
    """One of the two libraries in _lib.

    Attributes:
        path: Where it should be.
        exists: Whether it is there.
        newer_sources: Source files changed after it was built; empty without sources.
    """

    path: Path
    exists: bool
    newer_sources: tuple[str, ...] = ()


@dataclass(frozen=True)
class Observations:
    """What was seen. A field ending in _error is empty when its step worked.

    Attributes:
        versions: Distribution to installed version; distributions that are absent are left out.
        paddle_version: What the imported paddle says; empty when it does not import.
        registered_ops: Names that the op library registered with Paddle.
        cpu_isa: Key of ISA_CODES; empty when the C library does not load.
        num_cpus: Processors that this process may run on.
        has_cuda_build: Whether this Paddle contains CUDA.
        num_gpus: Devices it sees.
        has_demo_model: Whether the demo model lies in the package.
    """

    versions: dict[str, str]
    c_library: LibraryFile
    paddle_library: LibraryFile
    c_library_error: str = ""
    paddle_version: str = ""
    paddle_error: str = ""
    registered_ops: frozenset[str] = field(default_factory=frozenset)
    ops_error: str = ""
    cpu_isa: str = ""
    num_cpus: int = 1
    has_cuda_build: bool = False
    num_gpus: int = 0
    gpu_error: str = ""
    has_demo_model: bool = False


def newer_sources(library: Path, sources: Path) -> tuple[str, ...]:
    """Sources and headers changed after the library was built, relative to the folder of sources."""
    built = library.stat().st_mtime
    files = sorted(path for path in sources.rglob("*") if path.suffix in {".cc", ".cu", ".cuh", ".h"})
    return tuple(str(path.relative_to(sources)) for path in files if path.stat().st_mtime > built)


def observe_library(library: Path, sources: Path) -> LibraryFile:
    if not library.exists():
        return LibraryFile(path=library, exists=False)
    return LibraryFile(path=library, exists=True, newer_sources=newer_sources(library, sources))


def cpu_isa(library: Path) -> str:
    """The best instruction set of this processor that the kernels know.

    Raises:
        OSError: The library does not load.
    """
    function = ctypes.CDLL(str(library)).dsa_cpu_isa
    function.restype = ctypes.c_int32
    code = function()
    return next(name for name, known in ISA_CODES.items() if known == code)


def installed_versions(distributions: tuple[str, ...]) -> dict[str, str]:
    versions = {}
    for name in distributions:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _observe_paddle() -> dict[str, object]:
    """The fields of Observations that need an import of paddle."""
    try:
        paddle = import_module("paddle")
    except ImportError as error:
        return {"paddle_error": str(error)}
    seen: dict[str, object] = {"paddle_version": paddle.__version__}
    try:
        seen["registered_ops"] = load_paddle_ops()
    except ImportError as error:
        seen["ops_error"] = str(error)
    seen["has_cuda_build"] = paddle.is_compiled_with_cuda()
    if seen["has_cuda_build"]:
        try:
            seen["num_gpus"] = paddle.device.cuda.device_count()
        except (OSError, RuntimeError) as error:  # a driver that does not answer is a finding
            seen["gpu_error"] = str(error)
    return seen


def observe() -> Observations:
    """Look at this installation and this machine. Imports paddle when it is there."""
    c_library = observe_library(C_LIBRARY, SOURCES)
    isa, c_library_error = "", ""
    if c_library.exists:
        try:
            isa = cpu_isa(C_LIBRARY)
        except OSError as error:
            c_library_error = str(error)
    return Observations(
        versions=installed_versions((*CORE_DISTRIBUTIONS, *PADDLE_DISTRIBUTIONS, *SERVER_DISTRIBUTIONS, "paddlenlp")),
        c_library=c_library,
        c_library_error=c_library_error,
        paddle_library=observe_library(PADDLE_LIBRARY, SOURCES),
        cpu_isa=isa,
        num_cpus=len(os.sched_getaffinity(0)),
        has_demo_model=(DEMO_MODEL / "config.json").exists(),
        **_observe_paddle(),  # type: ignore[arg-type] # the names are fields of Observations
    )


def judge(seen: Observations) -> list[Finding]:
    """Turn observations into findings, in the order of a reader's questions. Pure."""
    return [
        *_judge_packages(seen),
        _judge_server(seen),
        _judge_paddle(seen),
        _judge_library("C library", seen.c_library, error=seen.c_library_error),
        _judge_library("Paddle ops", seen.paddle_library, error=seen.ops_error),
        _judge_ops(seen),
        _judge_cpu(seen),
        _judge_gpu(seen),
        _judge_demo_model(seen),
    ]


def _judge_packages(seen: Observations) -> Iterator[Finding]:
    absent = [name for name in CORE_DISTRIBUTIONS if name not in seen.versions]
    if absent:
        yield Finding("Python packages", "missing", f"not installed: {', '.join(absent)}", INSTALL_REMEDY)
    else:
        detail = ", ".join(f"{name} {seen.versions[name]}" for name in CORE_DISTRIBUTIONS)
        yield Finding("Python packages", "ok", detail)
    if "paddlenlp" in seen.versions:
        yield Finding("PaddleNLP (optional)", "ok", seen.versions["paddlenlp"])
    else:
        yield Finding("PaddleNLP (optional)", "note", "not installed; nothing here needs it", install_remedy("nlp"))


def _judge_server(seen: Observations) -> Finding:
    name = "HTTP server (optional)"
    absent = [package for package in SERVER_DISTRIBUTIONS if package not in seen.versions]
    if absent:
        detail = f"`fastdeploy-dsa serve` needs {', '.join(absent)}; nothing else does"
        return Finding(name, "note", detail, install_remedy("server"))
    return Finding(name, "ok", ", ".join(f"{package} {seen.versions[package]}" for package in SERVER_DISTRIBUTIONS))


def _judge_paddle(seen: Observations) -> Finding:
    name = "PaddlePaddle"
    if not seen.paddle_version:
        remedy = f"{INSTALL_REMEDY}, or [gpu] with an NVIDIA GPU"
        return Finding(name, "missing", f"does not import: {seen.paddle_error}", remedy)
    both = [distribution for distribution in PADDLE_DISTRIBUTIONS if distribution in seen.versions]
    if len(both) > 1:
        detail = f"{seen.paddle_version}, but {' and '.join(both)} are installed over each other"
        return Finding(name, "note", detail, f"uninstall {' and '.join(both)}, then install one of them")
    return Finding(name, "ok", seen.paddle_version)


def _judge_library(name: str, library: LibraryFile, *, error: str) -> Finding:
    if not library.exists:
        return Finding(name, "missing", f"{library.path.name} was not built", INSTALL_REMEDY)
    if error:
        return Finding(name, "missing", f"{library.path.name} does not load: {error}", INSTALL_REMEDY)
    if library.newer_sources:
        first, *rest = library.newer_sources
        more = f" and {len(rest)} more" if rest else ""
        return Finding(name, "note", f"{library.path.name} is older than {first}{more}", INSTALL_REMEDY)
    return Finding(name, "ok", library.path.name)


def _judge_ops(seen: Observations) -> Finding:
    absent = [op for op in OPS if f"dsa_{op}" not in seen.registered_ops]
    if not absent:
        return Finding("Registered ops", "ok", f"all {len(OPS)}")
    detail = f"{len(OPS) - len(absent)} of {len(OPS)}; without {', '.join(absent)}"
    return Finding("Registered ops", "missing", detail, INSTALL_REMEDY)


def _judge_cpu(seen: Observations) -> Finding:
    name = "Processor"
    if not seen.cpu_isa:
        return Finding(name, "missing", "unknown without the C library", INSTALL_REMEDY)
    return Finding(name, "ok", f"{seen.num_cpus} usable, kernels for {seen.cpu_isa} ({platform.machine()})")


def _judge_gpu(seen: Observations) -> Finding:
    name = "GPU (optional)"
    if not seen.has_cuda_build:
        return Finding(name, "note", "this Paddle has no CUDA; ops run on the CPU")
    if seen.gpu_error:
        return Finding(name, "note", f"Paddle has CUDA, the driver does not answer: {seen.gpu_error}")
    return Finding(name, "note", f"{seen.num_gpus} visible; GPU kernels are not built, ops run on the CPU")


def _judge_demo_model(seen: Observations) -> Finding:
    if seen.has_demo_model:
        return Finding("Demo model", "ok", "in the package")
    return Finding("Demo model", "note", "not in the package; pass the folder of a model instead")


def check_installation() -> list[Finding]:
    return judge(observe())


def exit_status(findings: list[Finding]) -> int:
    """0 when the CPU path works, else 1."""
    return int(any(finding.status == "missing" for finding in findings))


def render(findings: list[Finding], console: Console) -> None:
    """Print the findings as a table and, below it, whether the CPU path works."""
    colours: dict[Status, str] = {"ok": "green", "missing": "red", "note": "yellow"}
    table = Table("what", "status", "found", "to change it")
    for column in table.columns:
        column.overflow = "fold"  # names of files are of no use cut off
    for finding in findings:
        colour = colours[finding.status]
        table.add_row(finding.name, f"[{colour}]{finding.status}[/]", escape(finding.detail), escape(finding.remedy))
    console.print(table)
    works = exit_status(findings) == 0
    console.print("The CPU path works." if works else "The CPU path does not work: see the lines marked missing.")
