"""Packaging: the one thing pyproject.toml cannot say is which packages exist.

The Triton sources live in the top-level folder `kernels/`, which is no package of its own (the
import name `kernels` belongs to another project); `equiseg_fast/kernels` is a symbolic link to it,
so the packages are listed by hand instead of being searched for.
"""

from setuptools import setup

setup(
    packages=[
        "equiseg_fast",
        "equiseg_fast.data",
        "equiseg_fast.evaluation",
        "equiseg_fast.integrations",
        "equiseg_fast.kernels",
        "equiseg_fast.models",
        "equiseg_fast.nn",
        "equiseg_fast.ops",
        "equiseg_fast.testing",
        "equiseg_fast.training",
    ],
    package_data={"equiseg_fast": ["py.typed"]},
)
