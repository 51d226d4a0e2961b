"""Benchmarks of `equiseg_fast`, run from the repository root: `python -m benchmarks --help`."""

import os

# The profiler, which counts CPU memory, otherwise writes two lines per use; read at torch's import.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
