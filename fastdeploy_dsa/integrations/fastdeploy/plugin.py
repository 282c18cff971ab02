"""The entry points of FastDeploy's plug-in groups.

FastDeploy swallows what goes wrong while a plug-in is imported, so this module imports nothing that could fail; what
`register` raises ends the process with its message.
"""

from __future__ import annotations

from typing import Any


def register() -> None:
    """Let FastDeploy choose this package's backends, models, cache controller and block sizes; may be called again.

    Raises:
        PluginError: FastDeploy is not there, is a version that this package cannot serve with, or is started with
            switches that contradict each other; the message says which.
    """
    from fastdeploy_dsa.integrations.fastdeploy.installing import install

    install()


def runner_class() -> type[Any]:
    """The model runner of FastDeploy's GPU worker, with this package's cache controller and sizes.

    FastDeploy calls it after its own runner module is imported and before a runner is made, the one moment at which
    the controller's name in that module can be bound to another class.

    Raises:
        PluginError: As register.
    """
    from fastdeploy_dsa.integrations.fastdeploy.installing import install_runner

    return install_runner()
