"""Build of the native libraries; everything else about the package stands in pyproject.toml.

Two libraries are linked into fastdeploy_dsa/_lib from the same objects, so that their results are the same bits:

    libfastdeploy_dsa.so          the C ABI of custom_ops/include/dsa, no dependency on Paddle
    libfastdeploy_dsa_paddle.so   the same plus the Paddle ops of custom_ops/paddle

Paddle's own builder is not used: it allows one extension only, names it after the distribution and leaves files in
the source folder. An object is compiled again when its source, a header it includes, its flags or the compiler
changed, by content and not by time. The environment variable CXX names another compiler.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

# Relative, because compilers write source paths into error messages of the library.
OPS = Path("custom_ops")
# Not build_temp: pip chooses a new one for every editable install, and nothing would be found again.
OBJECTS = Path("build") / "objects"

C_LIBRARY = "fastdeploy_dsa._lib.libfastdeploy_dsa"
PADDLE_LIBRARY = "fastdeploy_dsa._lib.libfastdeploy_dsa_paddle"

COMMON_FLAGS = (
    "-std=c++17", "-O3", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-Wall", "-Wextra",
    f"-I{OPS / 'include'}", f"-I{OPS / 'cpu'}",
)  # fmt: skip
AVX2_FLAGS = ("-mavx2", "-mfma", "-mf16c")
AVX512_FLAGS = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", *AVX2_FLAGS)
# By the end of a file's stem. The library must run on every x86-64, so only these files may use more than SSE2.
INSTRUCTION_SET_FLAGS = {
    "_avx2": AVX2_FLAGS,
    "_avx512": AVX512_FLAGS,
    "_avx512_bf16": (*AVX512_FLAGS, "-mavx512bf16"),
}
# Kernels in the two libraries must not be replaced by each other's: whoever loads first would win.
LINK_FLAGS = ("-shared", "-s", "-fopenmp", "-Wl,-Bsymbolic", "-Wl,-z,now")


@dataclass(frozen=True)
class Unit:
    """One source file and the full command that compiles it, without the names of input and output."""

    source: Path
    command: tuple[str, ...]
    # What the flags mean, where it differs from their text: the Paddle version instead of a path that changes with
    # every isolated build.
    identity: str


@dataclass(frozen=True)
class Paddle:
    """The installed paddle package, found without importing it: an import prints and changes the environment."""

    folder: Path
    version: str

    @classmethod
    def find(cls) -> Paddle | None:
        spec = importlib.util.find_spec("paddle")
        if spec is None or not spec.submodule_search_locations:
            return None
        folder = Path(spec.submodule_search_locations[0])
        if not (folder / "include" / "paddle" / "phi" / "api" / "all.h").exists():
            return None
        text = (folder / "version" / "__init__.py").read_text()
        found = re.search(r"^full_version\s*=\s*'([^']+)'", text, re.MULTILINE)
        return cls(folder=folder, version=found.group(1) if found else "unknown")

    @property
    def compile_flags(self) -> tuple[str, ...]:
        include = self.folder / "include"
        return ("-DPADDLE_WITH_CUSTOM_KERNEL", "-isystem", str(include), "-isystem", str(include / "third_party"))

    @property
    def link_flags(self) -> tuple[str, ...]:
        # Nothing of libpaddle is found without a DT_NEEDED entry; no rpath: paddle is imported before we load.
        return (f"-L{self.folder / 'base'}", "-Wl,--no-as-needed", "-l:libpaddle.so", "-Wl,--as-needed")


def compiler() -> tuple[str, ...]:
    return tuple(os.environ.get("CXX", "g++").split())


def compiler_answer(option: str) -> str:
    """What the compiler says about itself.

    Raises:
        CompileError: There is no such compiler.
    """
    if shutil.which(compiler()[0]) is None:
        raise CompileError(f"{compiler()[0]} was not found: install g++ or name another C++ compiler in CXX")
    return subprocess.run([*compiler(), option], check=True, capture_output=True, text=True).stdout.strip()


def instruction_set(source: Path) -> str | None:
    """The suffix of INSTRUCTION_SET_FLAGS that the file's name ends in; None for plain files."""
    return next((suffix for suffix in INSTRUCTION_SET_FLAGS if source.stem.endswith(suffix)), None)


def kernel_units(*, is_x86: bool, compiler_version: str) -> list[Unit]:
    """The CPU kernels. Without x86 the vector files are left out; dispatch.h then never asks for them."""
    units = []
    for source in sorted((OPS / "cpu").glob("*.cc")):
        suffix = instruction_set(source)
        if suffix is not None and not is_x86:
            continue
        flags = (*COMMON_FLAGS, *(INSTRUCTION_SET_FLAGS[suffix] if suffix else ()))
        units.append(Unit(source, (*compiler(), *flags), identity=" ".join((compiler_version, *flags))))
    return units


def binding_units(paddle: Paddle, *, compiler_version: str) -> list[Unit]:
    command = (*compiler(), *COMMON_FLAGS, *paddle.compile_flags)
    identity = " ".join((compiler_version, *COMMON_FLAGS, "paddle", paddle.version))
    return [Unit(source, command, identity) for source in sorted((OPS / "paddle").glob("*.cc"))]


class ObjectStore:
    """Objects of earlier builds, each with the digest of all that went into it.

    For source a/b.cc: a/b.o, the compiler's dependency list a/b.d, and a/b.key, written last.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def object_path(self, unit: Unit) -> Path:
        return self._folder / unit.source.with_suffix(".o")

    def key(self, unit: Unit) -> str | None:
        """Digest of the unit's flags, source and headers as they are now; None before the first compilation."""
        dependencies = self.object_path(unit).with_suffix(".d")
        if not dependencies.exists():
            return None
        digest = hashlib.sha256(unit.identity.encode())
        rule = dependencies.read_text().replace("\\\n", " ").partition(":")[2]
        for name in sorted(set(rule.split())):
            if not Path(name).exists():
                return None
            digest.update(name.encode())
            digest.update(Path(name).read_bytes())
        return digest.hexdigest()

    def is_current(self, unit: Unit) -> bool:
        stamp = self.object_path(unit).with_suffix(".key")
        return stamp.exists() and stamp.read_text() == self.key(unit)

    def compile(self, unit: Unit) -> None:
        """Compile one unit, unless its object is current.

        Raises:
            CompileError: The compiler's message.
        """
        target = self.object_path(unit)
        stamp = target.with_suffix(".key")
        if self.is_current(unit):
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        stamp.unlink(missing_ok=True)
        print(f"compiling {unit.source}", flush=True)
        # -MMD lists our headers and leaves out those of the system and of Paddle, whose version is in the identity.
        outputs = ("-MMD", "-MF", str(target.with_suffix(".d")), "-c", str(unit.source), "-o", str(target))
        run((*unit.command, *outputs))
        stamp.write_text(self.key(unit) or "")


def run(command: tuple[str, ...]) -> None:
    """Run a compiler and show what it said.

    Raises:
        CompileError: It failed.
    """
    result = subprocess.run(command, check=False, capture_output=True, text=True)
    if result.returncode != 0:
        raise CompileError(f"{' '.join(command)}\n{result.stdout}{result.stderr}")
    if result.stderr:
        print(result.stderr, flush=True)


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Only one build at a time in a folder of objects."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


class BuildNative(build_ext):
    """Compiles all objects in parallel, then links both libraries."""

    def get_ext_filename(self, fullname: str) -> str:
        # These are libraries, not Python modules: no ABI tag in the name.
        return str(Path(*fullname.split("."))) + ".so"

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []

    def copy_extensions_to_source(self) -> None:
        (Path("fastdeploy_dsa") / "_lib").mkdir(exist_ok=True)
        super().copy_extensions_to_source()

    def build_extensions(self) -> None:
        with exclusive(OBJECTS):
            self._build()

    def _build(self) -> None:
        machine = compiler_answer("-dumpmachine")
        version = f"{machine} {compiler_answer('-dumpfullversion')}"
        paddle = Paddle.find()
        kernels = kernel_units(is_x86=machine.startswith("x86_64"), compiler_version=version)
        bindings = binding_units(paddle, compiler_version=version) if paddle else []

        store = ObjectStore(OBJECTS)
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            list(pool.map(store.compile, [*bindings, *kernels]))

        kernel_objects = [store.object_path(unit) for unit in kernels]
        self._link(C_LIBRARY, kernel_objects, flags=("-Wl,--no-undefined",))
        if paddle:
            binding_objects = [store.object_path(unit) for unit in bindings]
            self._link(PADDLE_LIBRARY, [*kernel_objects, *binding_objects], flags=paddle.link_flags)

    def _link(self, name: str, objects: list[Path], *, flags: tuple[str, ...]) -> None:
        target = Path(self.get_ext_fullpath(name))
        target.parent.mkdir(parents=True, exist_ok=True)
        # Linked beside the target and moved: a process that has the old library open keeps it whole.
        beside = target.with_suffix(".new")
        run((*compiler(), *LINK_FLAGS, *map(str, objects), "-o", str(beside), *flags))
        beside.replace(target)


def extensions() -> list[Extension]:
    """What pip is told that we build; the sources are found by BuildNative."""
    names = [C_LIBRARY]
    if Paddle.find() is None:
        print("paddle is not installed: only the C library is built, without the Paddle ops", flush=True)
    else:
        names.append(PADDLE_LIBRARY)
    return [Extension(name, sources=[]) for name in names]


if __name__ == "__main__":
    setup(ext_modules=extensions(), cmdclass={"build_ext": BuildNative})
