"""Tests of the package, importable so that they share tests/kit."""

import os

# The float64 references multiply small matrices: threads of NumPy's OpenBLAS that wait for each other on busy cores
# took 200 s where one thread takes 40 s. To be said before NumPy is imported; the package's kernels do not care.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
