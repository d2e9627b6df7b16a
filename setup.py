"""Packaging: the parts of the metadata that are read from other files; the rest stands in pyproject.toml."""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent


def version() -> str:
    """`verl.__version__`, read without importing the package."""
    source = ROOT / "verl" / "__init__.py"
    found = re.search(r'^__version__ = "([^"]+)"$', source.read_text(encoding="utf-8"), re.MULTILINE)
    if found is None:
        raise ValueError(f'{source}: no line __version__ = "..."')
    return found[1]


def requirements(name: str) -> list[str]:
    """The requirements of one file, without comments and blank lines."""
    lines = (line.split("#")[0].strip() for line in (ROOT / name).read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line]


setup(
    version=version(),
    packages=find_packages(include=["verl", "verl.*"]),
    package_data={"verl": ["**/*.yaml"]},
    install_requires=requirements("requirements_timemaster.txt"),
    extras_require={
        "gpu": ["torch>=2.11,<2.12", "vllm>=0.26,<0.27", "liger-kernel>=0.8,<1"],
        "flash": ["flash-attn>=2.8,<3"],
        "dev": requirements("requirements/dev.txt"),
    },
)
