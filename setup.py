"""Build of the native libraries; everything else about the package stands in pyproject.toml.

Two libraries are linked into fastdeploy_dsa/_lib from the same objects, so that their results are the same bits:

    libfastdeploy_dsa.so          the C ABI of custom_ops/include/dsa, no dependency on Paddle
    libfastdeploy_dsa_paddle.so   the same plus the Paddle ops of custom_ops/paddle

Paddle's own builder is not used: it allows one extension only, names it after the distribution and leaves files in
the source folder. An object is compiled again when its source, a header it includes, its flags or the compiler
changed, by content and not by time.

CUDA kernels, custom_ops/gpu, go into both libraries when the installed Paddle is a CUDA build. Environment variables:

    CXX, NVCC                           other compilers
    FASTDEPLOY_DSA_CUDA                 1: with CUDA kernels, 0: without, whatever Paddle is
    FASTDEPLOY_DSA_CUDA_ARCHITECTURES   compute capabilities, such as "80;90a"
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
# Hopper's matrix and register instructions exist in 90a alone, which runs on no other chip.
HOPPER = "90a"
# Generic kernels run from 80 on: of that they keep the PTX, too, which later drivers compile for later chips.
DEFAULT_ARCHITECTURES = f"80;{HOPPER}"
# Compressed, the libraries with the line numbers that profilers want are a quarter of the size.
CUDA_FLAGS = (
    "-std=c++17", "-O3", "-lineinfo", "-Xfatbin=-compress-all", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall",
    "-DDSA_WITH_CUDA", f"-I{OPS / 'include'}", f"-I{OPS / 'cpu'}", f"-I{OPS / 'gpu'}",
)  # fmt: skip
# What ptxas mentions in passing and what makes a kernel several times slower: matrix instructions that wait for each
# other (C7510 to C7519), and registers that were not handed over.
SLOW_KERNEL = re.compile(r"^.*(?:\(C751\d\)|setmaxnreg.* ignored).*$", re.MULTILINE)
# C++ files that mention CUDA; g++ compiles them all the same.
CUDA_AWARE = ("common.cc",)

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
    # Objects of both kinds of build are kept, so that neither makes the other compile again.
    folder: str = ""


@dataclass(frozen=True)
class Cuda:
    """A CUDA toolkit and what to compile for."""

    nvcc: str
    folder: Path
    version: str
    architectures: tuple[str, ...]

    @classmethod
    def find(cls) -> Cuda:
        """Ask nvcc.

        Raises:
            CompileError: There is no nvcc, or an architecture is none.
        """
        nvcc = os.environ.get("NVCC", "nvcc")
        if shutil.which(nvcc) is None:
            raise CompileError(
                f"{nvcc} was not found: install the CUDA toolkit, name its compiler in NVCC, "
                "or build without CUDA kernels: FASTDEPLOY_DSA_CUDA=0"
            )
        architectures = os.environ.get("FASTDEPLOY_DSA_CUDA_ARCHITECTURES", DEFAULT_ARCHITECTURES)
        names = tuple(name.strip() for name in architectures.split(";"))
        wrong = [name for name in names if not re.fullmatch(r"[1-9]\d+[af]?", name)]
        if wrong:
            raise CompileError(
                f'FASTDEPLOY_DSA_CUDA_ARCHITECTURES: expected numbers as in "80;90a", got {architectures!r}'
            )
        # nvcc may be a script elsewhere; what it would run says where the toolkit is.
        top = re.search(r"^#\$ TOP=(.+)$", answer(nvcc, "--dryrun", "-x", "cu", "-c", os.devnull), re.MULTILINE)
        if top is None:
            raise CompileError(f"{nvcc} --dryrun does not say where its toolkit is")
        return cls(nvcc, Path(top.group(1)).resolve(), answer(nvcc, "--version").split()[-1], names)

    def code_flags(self, source: Path) -> tuple[str, ...] | None:
        """What nvcc generates for a file; None for a file of an architecture that nobody asked for."""
        if source.stem.endswith("_sm90") or "_sm90_" in source.stem:
            return (gencode(HOPPER),) if HOPPER in self.architectures else None
        plain = [name for name in self.architectures if name.isdigit()]
        ptx = (f"-gencode=arch=compute_{plain[-1]},code=compute_{plain[-1]}",) if plain else ()
        return (*map(gencode, self.architectures), *ptx)

    @property
    def link_flags(self) -> tuple[str, ...]:
        # Static and hidden: the library loads where there is no CUDA, and beside another version of the runtime.
        runtime = ("-l:libcudart_static.a", "-ldl", "-lrt", "-lpthread")
        return (f"-L{self.folder / 'lib64'}", f"-L{self.folder / 'lib'}", *runtime, "-Wl,--exclude-libs,ALL")


def gencode(architecture: str) -> str:
    return f"-gencode=arch=compute_{architecture},code=sm_{architecture}"


@dataclass(frozen=True)
class Paddle:
    """The installed paddle package, found without importing it: an import prints and changes the environment."""

    folder: Path
    version: str
    has_cuda: bool

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
        cuda = re.search(r"^cuda_version\s*=\s*'(\d[^']*)'", text, re.MULTILINE)
        return cls(folder=folder, version=found.group(1) if found else "unknown", has_cuda=cuda is not None)

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
    return answer(*compiler(), option)


def answer(*command: str) -> str:
    """What a compiler says when it is asked."""
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return done.stdout.strip()


def instruction_set(source: Path) -> str | None:
    """The suffix of INSTRUCTION_SET_FLAGS that the file's name ends in; None for plain files."""
    return next((suffix for suffix in INSTRUCTION_SET_FLAGS if source.stem.endswith(suffix)), None)


def wants_cuda(paddle: Paddle | None) -> bool:
    """Whether CUDA kernels are built.

    Raises:
        CompileError: FASTDEPLOY_DSA_CUDA is neither 0 nor 1.
    """
    wish = os.environ.get("FASTDEPLOY_DSA_CUDA", "")
    if wish not in {"", "0", "1"}:
        raise CompileError(f"FASTDEPLOY_DSA_CUDA: expected 0 or 1, got {wish!r}")
    return wish == "1" if wish else paddle is not None and paddle.has_cuda


def kernel_units(*, is_x86: bool, compiler_version: str, cuda: Cuda | None = None) -> list[Unit]:
    """The CPU kernels. Without x86 the vector files are left out; dispatch.h then never asks for them."""
    units = []
    for source in sorted((OPS / "cpu").glob("*.cc")):
        suffix = instruction_set(source)
        if suffix is not None and not is_x86:
            continue
        flags = (*COMMON_FLAGS, *(INSTRUCTION_SET_FLAGS[suffix] if suffix else ()))
        command, identity = (*compiler(), *flags), " ".join((compiler_version, *flags))
        if cuda and source.name in CUDA_AWARE:
            include = ("-DDSA_WITH_CUDA", "-isystem", str(cuda.folder / "include"))
            units.append(Unit(source, (*command, *include), f"{identity} cuda {cuda.version}", folder="cuda"))
        else:
            units.append(Unit(source, command, identity))
    return units


def cuda_units(cuda: Cuda) -> list[Unit]:
    """The CUDA kernels. DSA_HAS_SM90 says whether the files for Hopper alone are among them."""
    hopper = f"-DDSA_HAS_SM90={int(HOPPER in cuda.architectures)}"
    units = []
    for source in sorted((OPS / "gpu").glob("*.cu")):
        code = cuda.code_flags(source)
        if code is not None:
            flags = (*CUDA_FLAGS, hopper, *code)
            units.append(Unit(source, (cuda.nvcc, *flags), " ".join((cuda.version, *flags)), folder="cuda"))
    return units


def binding_units(paddle: Paddle, *, compiler_version: str, cuda: Cuda | None = None) -> list[Unit]:
    flags = (*COMMON_FLAGS, "-DDSA_WITH_CUDA") if cuda else COMMON_FLAGS
    command = (*compiler(), *flags, *paddle.compile_flags)
    identity = " ".join((compiler_version, *flags, "paddle", paddle.version))
    folder = "cuda" if cuda else ""
    return [Unit(source, command, identity, folder) for source in sorted((OPS / "paddle").glob("*.cc"))]


class ObjectStore:
    """Objects of earlier builds, each with the digest of all that went into it.

    For source a/b.cc: a/b.o, the compiler's dependency list a/b.d, and a/b.key, written last.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def object_path(self, unit: Unit) -> Path:
        return self._folder / unit.folder / unit.source.with_suffix(".o")

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
        CompileError: It failed, or made something that is much slower than it should be.
    """
    result = subprocess.run(command, check=False, capture_output=True, text=True)
    if result.returncode != 0:
        raise CompileError(f"{' '.join(command)}\n{result.stdout}{result.stderr}")
    slow = SLOW_KERNEL.findall(result.stdout + result.stderr)
    if slow:
        raise CompileError("\n".join((" ".join(command), "compiled, but into a slow kernel:", *slow)))
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
        cuda = Cuda.find() if wants_cuda(paddle) else None
        kernels = kernel_units(is_x86=machine.startswith("x86_64"), compiler_version=version, cuda=cuda)
        if cuda:
            kernels = [*cuda_units(cuda), *kernels]  # nvcc takes longest
        bindings = binding_units(paddle, compiler_version=version, cuda=cuda) if paddle else []

        store = ObjectStore(OBJECTS)
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            list(pool.map(store.compile, [*kernels, *bindings]))

        kernel_objects = [store.object_path(unit) for unit in kernels]
        cuda_runtime = cuda.link_flags if cuda else ()
        self._link(C_LIBRARY, kernel_objects, flags=("-Wl,--no-undefined", *cuda_runtime))
        if paddle:
            binding_objects = [store.object_path(unit) for unit in bindings]
            flags = (*paddle.link_flags, *cuda_runtime)
            self._link(PADDLE_LIBRARY, [*kernel_objects, *binding_objects], flags=flags)

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
