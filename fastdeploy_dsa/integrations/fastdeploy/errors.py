"""What the plug-in raises when FastDeploy starts and cannot be served."""

from __future__ import annotations


class PluginError(RuntimeError):
    """A start that must not go on: the message names what was found and what to change."""

    def __init__(self, message: str) -> None:
        """Put the plug-in's name in front, so that the line can be found in FastDeploy's log."""
        super().__init__(f"fastdeploy_dsa: {message}")
