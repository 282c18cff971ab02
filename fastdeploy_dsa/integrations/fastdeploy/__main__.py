"""`python -m fastdeploy_dsa.integrations.fastdeploy`: what the plug-in finds here and would choose."""

from __future__ import annotations

import os
import sys

from fastdeploy_dsa.integrations.fastdeploy.errors import PluginError
from fastdeploy_dsa.integrations.fastdeploy.installing import BACKEND_OF_NAME, install
from fastdeploy_dsa.integrations.fastdeploy.log_table import capability_rows, format_table, is_allowed, switch_rows
from fastdeploy_dsa.integrations.fastdeploy.settings import read_settings


def main() -> int:
    """Print the table.

    Returns:
        0 if the plug-in is live, 1 with the reason if FastDeploy could not be served with, 2 if FastDeploy would not
        load the plug-in or not ask it for a backend.
    """
    try:
        settings = read_settings()
        found = install()
    except PluginError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    sys.stdout.write(format_table((*switch_rows(os.environ, settings), *capability_rows(found))) + "\n")
    return 0 if is_allowed(os.environ) and found.attention_backend in BACKEND_OF_NAME else 2


if __name__ == "__main__":
    sys.exit(main())
