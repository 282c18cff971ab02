"""`python -m fastdeploy_dsa` is the command line."""

import sys

from fastdeploy_dsa.cli import main

sys.exit(main())
