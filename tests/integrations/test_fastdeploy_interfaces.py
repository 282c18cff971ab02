"""The plug-in against the recorded interfaces, and those against FastDeploy itself where it is importable."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from tests.integrations.fastdeploy_interfaces import (
    ENTRY_POINTS,
    FORWARD_META_FIELDS,
    INTERFACES,
    STORAGE_NAMES,
    Interface,
)
from tests.kit.goldens import REPOSITORY

PLUGIN = REPOSITORY / "fastdeploy_dsa" / "integrations" / "fastdeploy"

every_interface = pytest.mark.parametrize("interface", INTERFACES, ids=lambda it: it.theirs.rsplit(".", 1)[1])


def written_parameters(function: ast.FunctionDef) -> str:
    """Parameters of a method without self, as "a, b=1"."""
    names = [argument.arg for argument in function.args.args[1:]]
    names += [f"*{argument.arg}" for argument in (function.args.vararg,) if argument]
    defaults = [ast.unparse(default) for default in function.args.defaults]
    first = len(names) - len(defaults)
    return ", ".join(name if at < first else f"{name}={defaults[at - first]}" for at, name in enumerate(names))


def methods_of(path: Path, class_name: str) -> dict[str, str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    (found,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == class_name)
    return {node.name: written_parameters(node) for node in found.body if isinstance(node, ast.FunctionDef)}


def runtime_parameters(function: Any) -> str:
    parameters = list(inspect.signature(function).parameters.values())[1:]
    empty = inspect.Parameter.empty
    return ", ".join(p.name if p.default is empty else f"{p.name}={p.default!r}" for p in parameters)


def find(name: str) -> Any:
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


@every_interface
def test_the_plugin_takes_what_fastdeploy_passes_under_the_same_names(interface: Interface) -> None:
    ours: dict[str, str] = {}
    for file, class_name in interface.ours:
        ours |= methods_of(PLUGIN / file, class_name)
    for method, parameters in interface.methods.items():
        assert ours.get(method) == parameters, method


@every_interface
@pytest.mark.needs_fastdeploy
def test_the_recorded_interface_is_fastdeploys(interface: Interface) -> None:
    pytest.importorskip("paddle")
    from tests.integrations.fastdeploy_rig import shims

    shims.apply()
    if interface.ours[0][0] == "mtp.py" and importlib.util.find_spec("fastdeploy.cache_manager.v1") is None:
        pytest.skip("the plug-in refuses draft models with this version: it has no v1 cache manager")
    try:
        theirs = find(interface.theirs)
    except ModuleNotFoundError as missing:
        pytest.skip(f"{interface.theirs} cannot be imported here: {missing}")
    for method, parameters in interface.methods.items():
        function = getattr(theirs, method, None)
        if function is None and method in interface.later:
            continue
        # Defaults of parameters that are always passed differ between versions; names and their order do not.
        assert names(runtime_parameters(function)) == names(parameters), method


def names(parameters: str) -> list[str]:
    return [parameter.split("=")[0].strip() for parameter in parameters.split(",") if parameter.strip()]


@pytest.mark.needs_fastdeploy
def test_forward_meta_has_the_fields_the_plugin_reads() -> None:
    from tests.integrations.fastdeploy_rig import shims

    shims.apply()
    from fastdeploy.model_executor.forward_meta import ForwardMeta

    assert set(FORWARD_META_FIELDS) <= {field.name for field in fields(ForwardMeta)}


def test_both_entry_points_have_the_name_that_fd_plugins_holds() -> None:
    text = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
    for group, (name, function) in ENTRY_POINTS.items():
        section = text.split(f'[project.entry-points."{group}"]')[1].split("[")[0]
        assert section.strip() == f'{name} = "fastdeploy_dsa.integrations.fastdeploy.plugin:{function}"'


@pytest.mark.needs_fastdeploy
@pytest.mark.needs_cache_controller
def test_storage_names_of_all_five_roles_are_the_golden_ones() -> None:
    controller = find("tests.integrations.fastdeploy_rig.controllers.bare_controller")(
        local_rank=3, device_id=5, tensor_parallel_size=2
    )
    assert controller._get_cache_names(3) == STORAGE_NAMES
    assert {role: controller._format_cache_name(role, 3) for role in STORAGE_NAMES} == STORAGE_NAMES
    with pytest.raises(ValueError, match="role: expected one of key, value"):
        controller._format_cache_name("latent", 3)
