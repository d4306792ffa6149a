"""requirements.lock, and the messages of scripts/setup.sh when it cannot continue."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent.parent
SETUP = ROOT / "scripts" / "setup.sh"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LOCK = (ROOT / "requirements.lock").read_text()
# The commands that setup.sh calls and does not install. With only these on PATH, everything else is missing.
BARE = ("awk", "bash", "cat", "cut", "dirname", "env", "flock", "grep", "head", "mkdir", "sha256sum", "sort", "tail")


def locked() -> dict[str, tuple[Requirement, str]]:
    """Return each package of the lock: its requirement and the lines that belong to it."""
    entries = re.findall(r"^([^\s#].*?)\s*\\\n((?:[ \t].*\n?)*)", LOCK, flags=re.MULTILINE)
    return {canonicalize_name(Requirement(line).name): (Requirement(line), rest) for line, rest in entries}


def asked_for() -> list[Requirement]:
    return [Requirement(line) for line in [*PROJECT["project"]["dependencies"], *PROJECT["dependency-groups"]["dev"]]]


def test_the_lock_has_one_version_and_hashes_of_every_package():
    packages = locked()

    assert len(packages) == len(re.findall(r"^[^\s#]", LOCK, flags=re.MULTILINE)) > 100
    for requirement, rest in packages.values():
        (specifier,) = requirement.specifier
        assert specifier.operator == "==", requirement
        assert re.search(r"--hash=sha256:[0-9a-f]{64}\b", rest), requirement


def test_the_lock_has_no_addresses():
    assert "://" not in LOCK
    assert not re.search(
        r"^\s*(-i|-f|--(extra-)?index(-url)?|--find-links|--default-index)\b", LOCK, flags=re.MULTILINE
    )


@pytest.mark.parametrize("requirement", asked_for(), ids=str)
def test_the_lock_satisfies_pyproject(requirement):
    packages = locked()
    name = canonicalize_name(requirement.name)

    assert name in packages, f"{requirement} is not in requirements.lock; run `make lock`"
    (pinned,) = packages[name][0].specifier
    assert requirement.specifier.contains(pinned.version), f"the lock has {pinned.version}; run `make lock`"


def test_the_lock_covers_every_python_that_setup_accepts():
    text = SETUP.read_text()
    supported = SpecifierSet(PROJECT["project"]["requires-python"])
    pythons = [f"3.{minor}" for minor in range(9, 20) if supported.contains(f"3.{minor}")]

    assert f"PYTHON_RANGE='{PROJECT['project']['requires-python']}'" in text
    low, high = re.search(r"\(3, (\d+)\) <= sys\.version_info\[:2\] < \(3, (\d+)\)", text).groups()
    assert pythons == [f"3.{minor}" for minor in range(int(low), int(high))]
    for python in pythons:
        linux = {**default_environment(), "sys_platform": "linux", "platform_machine": "x86_64"}
        linux |= {"python_version": python, "python_full_version": f"{python}.0"}
        left_out = [str(item) for item, _ in locked().values() if item.marker and not item.marker.evaluate(linux)]
        assert all("win32" in item or "emscripten" in item for item in left_out)


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """A copy of the files that setup.sh reads, and a folder `bin` that becomes the whole PATH."""
    project, binaries = tmp_path / "project", tmp_path / "bin"
    (project / "scripts").mkdir(parents=True)
    binaries.mkdir()
    shutil.copy(SETUP, project / "scripts")
    shutil.copy(ROOT / "requirements.lock", project)
    for name in BARE:
        found = shutil.which(name)
        assert found, name
        (binaries / name).symlink_to(found)
    return tmp_path


def script(machine: Path, name: str, text: str) -> None:
    file = machine / "bin" / name
    file.write_text(f"#!/bin/sh\n{text}\n")
    file.chmod(0o755)


def set_up(machine: Path) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": str(machine / "bin"), "HOME": str(machine)}
    command = ["bash", str(machine / "project" / "scripts" / "setup.sh")]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)


def test_without_apt_the_missing_packages_are_named_with_the_command(machine):
    done = set_up(machine)

    assert done.returncode == 1
    packages = "make g++ pkg-config libopencv-dev libturbojpeg0-dev python3 python3-dev python3-pip"
    assert done.stderr.splitlines()[0] == f"setup: missing system packages: {packages}"
    assert f"sudo apt-get update && sudo apt-get install -y --no-install-recommends {packages}" in done.stderr
    assert not (machine / "project" / ".venv").exists()


def test_only_what_is_missing_is_named(machine):
    for name in ("make", "cc", "c++", "python3"):
        script(machine, name, "exit 0")
    script(machine, "uv", "echo uv 999.0.0")
    script(machine, "pkg-config", 'test "$2" = libturbojpeg')
    # This python3 answers every question with exit code 0: it is in range and names no headers.
    done = set_up(machine)

    assert done.stderr.splitlines()[0] == "setup: missing system packages: libopencv-dev python3-dev"


def test_an_old_uv_is_not_used(machine):
    for name in ("make", "cc", "c++", "pkg-config"):
        script(machine, name, "exit 0")
    script(machine, "uv", "echo uv 0.4.30")
    script(machine, "python3", "exit 1")
    done = set_up(machine)

    assert done.stderr.splitlines()[0] == "setup: missing system packages: python3-pip"


def test_apt_updates_its_lists_only_when_the_installation_fails(machine):
    script(machine, "sudo", 'test "$1" = -n && shift\nexec "$@"')
    script(machine, "true", "exit 0")
    script(
        machine, "apt-get", f'echo "$1 $DEBIAN_FRONTEND" >>{machine}/calls\necho E: no such package\ntest "$1" = update'
    )
    done = set_up(machine)

    assert done.returncode == 1
    calls = (machine / "calls").read_text().splitlines()
    assert calls == ["install noninteractive", "update noninteractive", "install noninteractive"]
    assert "setup: apt-get could not install make g++" in done.stderr
    assert "E: no such package" in done.stderr


def test_a_finished_setup_is_not_repeated():
    if not (ROOT / ".venv" / ".setup-finished").exists():
        pytest.skip("this environment was not made by scripts/setup.sh")
    marker = ROOT / ".venv" / ".setup-finished"
    before = marker.stat().st_mtime_ns
    environment = {**os.environ, "UV_OFFLINE": "1"}
    done = subprocess.run([SETUP], env=environment, capture_output=True, text=True, check=False, timeout=60)

    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert marker.stat().st_mtime_ns == before
