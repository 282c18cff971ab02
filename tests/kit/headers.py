"""The C ABI as its headers say it: structs, constants and functions for ctypes, read from the header text.

Nothing is mirrored by hand. The headers are plain C11: after comments and preprocessor lines are gone, only typedefs,
enums, structs and function declarations are left.
"""

from __future__ import annotations

import ctypes
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

INCLUDE = Path(__file__).resolve().parents[2] / "custom_ops" / "include" / "dsa"

SCALARS: dict[str, type] = {
    "float": ctypes.c_float,
    "int32_t": ctypes.c_int32,
    "int64_t": ctypes.c_int64,
    "size_t": ctypes.c_size_t,
    "uint8_t": ctypes.c_uint8,
    "uint16_t": ctypes.c_uint16,
}


@dataclass(frozen=True)
class Prototype:
    """A function declaration as ctypes types."""

    name: str
    result: type
    arguments: tuple[type, ...]


class Headers:
    """All headers of a folder."""

    def __init__(self, folder: Path = INCLUDE) -> None:
        text = "\n".join(path.read_text() for path in sorted(folder.glob("*.h")))
        text = re.sub(r"/\*.*?\*/", " ", text, flags=re.DOTALL)
        self._text = re.sub(r"^\s*#.*$", "", text, flags=re.MULTILINE)

    @cached_property
    def constants(self) -> dict[str, int]:
        """Every named enum constant; all of them have an explicit value."""
        bodies = re.findall(r"\benum\s*\{(.*?)\}", self._text, re.DOTALL)
        return {name: int(value) for body in bodies for name, value in re.findall(r"(\w+)\s*=\s*(-?\d+)", body)}

    @cached_property
    def structs(self) -> dict[str, type[ctypes.Structure]]:
        """Every struct by its typedef name; a field may be a struct."""
        waiting = {name: [self._split_field(line) for line in body] for name, body in self._struct_bodies.items()}
        found: dict[str, type[ctypes.Structure]] = {}
        while waiting:
            ready = [name for name, fields in waiting.items() if not {kind for _, kind in fields} & set(waiting)]
            if not ready:
                raise ValueError(f"header: structs contain each other: {sorted(waiting)}")
            for name in ready:
                fields = [(field, found.get(kind) or self._type(kind)) for field, kind in waiting.pop(name)]
                found[name] = type(name, (ctypes.Structure,), {"_fields_": fields})
        return found

    def fields(self, struct: str, prefix: str = "") -> dict[str, type]:
        """Every field of a struct; that of a struct inside it is called outer.inner."""
        found: dict[str, type] = {}
        for name, kind in dict(self.structs[struct]._fields_).items():
            if issubclass(kind, ctypes.Structure):
                found |= self.fields(kind.__name__, f"{prefix}{name}.")
            else:
                found[prefix + name] = kind
        return found

    def read_only(self, struct: str, prefix: str = "") -> set[str]:
        """Fields, named as above, that point to memory which the op does not change."""
        found: set[str] = set()
        for name, kind in (self._split_field(line) for line in self._struct_bodies[struct]):
            if kind in self.structs:
                found |= self.read_only(kind, f"{prefix}{name}.")
            elif "*" in kind and "const" in kind:
                found.add(prefix + name)
        return found

    @cached_property
    def _struct_bodies(self) -> dict[str, list[str]]:
        found = re.findall(r"typedef\s+struct\s+\w+\s*\{(.*?)\}\s*(\w+)\s*;", self._text, re.DOTALL)
        return {name: [line for line in body.split(";") if line.strip()] for body, name in found}

    @cached_property
    def prototypes(self) -> dict[str, Prototype]:
        """Every exported function."""
        found = re.findall(r"DSA_API\s+([\w\s*]+?)(\w+)\s*\(([^)]*)\)\s*;", self._text)
        return {
            name: Prototype(name, self._type(result), tuple(self._argument(part) for part in self._split(arguments)))
            for result, name, arguments in found
        }

    @cached_property
    def _scalars(self) -> dict[str, type]:
        aliases = re.findall(r"typedef\s+(\w+)\s+(\w+)\s*;", self._text)
        return SCALARS | {alias: SCALARS[original] for original, alias in aliases}

    @staticmethod
    def _split(arguments: str) -> list[str]:
        return [] if arguments.strip() in {"", "void"} else arguments.split(",")

    def _argument(self, declaration: str) -> type:
        return self._type(self._split_field(declaration)[1])

    @staticmethod
    def _split_field(declaration: str) -> tuple[str, str]:
        """Name and type of a declaration."""
        match = re.fullmatch(r"\s*([\w\s]+?[\s*]+)(\w+)\s*", declaration)
        if match is None:
            raise ValueError(f"header: not a declaration: {declaration!r}")
        return match.group(2), match.group(1).strip()

    def _type(self, text: str) -> type:
        words = text.replace("const", " ").split()
        base = words[0].rstrip("*")
        if "*" not in text:
            return self._scalars[base]
        return ctypes.c_char_p if base == "char" else ctypes.c_void_p


class CLibrary:
    """A loaded C library with the functions of the headers typed and the sizes of structs compared."""

    def __init__(self, path: Path, headers: Headers | None = None) -> None:
        self.headers = headers or Headers()
        self._library = ctypes.CDLL(str(path))
        for prototype in self.headers.prototypes.values():
            function = getattr(self._library, prototype.name, None)
            if function is not None:
                function.restype, function.argtypes = prototype.result, prototype.arguments

    def struct(self, name: str) -> type[ctypes.Structure]:
        """A struct of the headers.

        Raises:
            RuntimeError: The library was compiled with another one.
        """
        struct, theirs = self.headers.structs[name], self.call(f"{name}_size")
        if theirs != ctypes.sizeof(struct):
            raise RuntimeError(f"{name}: {ctypes.sizeof(struct)} bytes in the header, {theirs} in the library")
        return struct

    def call(self, name: str, *arguments: object) -> object:
        """Call a function.

        Raises:
            AttributeError: The library lacks it.
        """
        return getattr(self._library, name)(*arguments)

    def workspace_bytes(self, op: str, params: ctypes.Structure, options: ctypes.Structure) -> int:
        """Scratch memory of an op on the CPU; 0 for an op without any."""
        return self._workspace_bytes(f"dsa_{op}_workspace_bytes", ctypes.byref(params), ctypes.byref(options))

    def cuda_workspace_bytes(self, op: str, params: ctypes.Structure) -> int:
        """Scratch memory of an op on the GPU; 0 for an op without any."""
        return self._workspace_bytes(f"dsa_{op}_cuda_workspace_bytes", ctypes.byref(params))

    def _workspace_bytes(self, name: str, *arguments: object) -> int:
        if name not in self.headers.prototypes:
            return 0
        size = self.call(name, *arguments)
        assert isinstance(size, int)
        return size

    def status_text(self, status: int) -> str:
        """What a status means."""
        text = self.call("dsa_status_text", status)
        return text.decode() if isinstance(text, bytes) else "unknown status"
