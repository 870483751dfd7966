"""What pyproject.toml declares: pip leaves what is installed in place, and the bounds are what the tests ran with."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Iterable, Mapping
from importlib.metadata import Distribution, distribution, distributions
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

tomllib = pytest.importorskip("tomllib", reason="Python 3.10 cannot read pyproject.toml by itself")
# pip is asked for without importing it: setuptools leaves distutils alone where pip was looked for.
if not [*distributions(name="pip")]:
    pytest.skip("this environment was made without pip", allow_module_level=True)

from tests import versions  # noqa: E402 - it needs tomllib

PROJECT: dict[str, Any] = tomllib.loads(versions.PROJECT.read_text(encoding="utf-8"))["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
BOUNDS = versions.lower_bounds(versions.PROJECT.read_text(encoding="utf-8"))
# Newer than anything that is installed here, so that pip takes it wherever it may.
NEWEST_TORCH = "2.99.0"


def metadata(name: str, version: str, requires: Iterable[str] = (), extras: Iterable[str] = ()) -> str:
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    lines += [*(f"Provides-Extra: {extra}" for extra in extras), *(f"Requires-Dist: {one}" for one in requires)]
    return "\n".join(lines) + "\n"


def wheel(folder: Path, name: str, version: str, text: str) -> None:
    """A wheel that holds nothing but its metadata."""
    stem = f"{name.replace('-', '_')}-{version}"
    tag = "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    with zipfile.ZipFile(folder / f"{stem}-py3-none-any.whl", "w") as file:
        for path, content in (("METADATA", text), ("WHEEL", tag), ("RECORD", "")):
            file.writestr(f"{stem}.dist-info/{path}", content)


def needed(requirements: Iterable[str]) -> dict[str, Distribution]:
    """The installed packages that requirements ask for, and what those ask for."""
    found: dict[str, Distribution] = {}
    waiting = [(Requirement(one), "") for one in requirements]
    while waiting:
        requirement, extra = waiting.pop()
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        new = name not in found
        if new:
            found[name] = distribution(name)
        for chosen in requirement.extras or ({""} if new else ()):
            waiting += [(Requirement(one), chosen) for one in found[name].requires or ()]
    return found


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package and all that it needs, as wheels without content; of torch, a newer one too."""
    folder = tmp_path_factory.mktemp("index")
    extras = [f"{one}; extra == '{extra}'" for extra, requires in EXTRAS.items() for one in requires]
    text = metadata(PROJECT["name"], "9", [*PROJECT["dependencies"], *extras], EXTRAS)
    wheel(folder, PROJECT["name"], "9", text)
    for name, one in needed([*PROJECT["dependencies"], *EXTRAS["record"], *EXTRAS["examples"]]).items():
        version = Version(one.version).public
        wheel(folder, name, version, metadata(name, version, one.requires or ()))
    wheel(folder, "torch", NEWEST_TORCH, metadata("torch", NEWEST_TORCH))
    return folder


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment in which nothing is installed."""
    environment = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    return environment


def fetched(index: Path, environment: Path, installed: Mapping[str, str], what: str) -> dict[str, str]:
    """What pip would install into an environment that has some packages already, and no others."""
    base = {"base": str(environment), "platbase": str(environment)}
    packages = Path(sysconfig.get_path("purelib", vars=base))
    for one in packages.glob("*.dist-info"):
        shutil.rmtree(one)
    for name, version in installed.items():
        place = packages / f"{name.replace('-', '_')}-{version}.dist-info"
        place.mkdir()
        (place / "METADATA").write_text(metadata(name, version), encoding="utf-8")
    report = environment / "report.json"
    pip = [sys.executable, "-m", "pip", "--isolated", "--python", str(environment / "bin" / "python"), "install"]
    options = ["--quiet", "--dry-run", "--no-index", "--find-links", str(index), "--report", str(report)]
    # What this machine tells its pip does not matter here.
    variables = {**os.environ, "PIP_CONFIG_FILE": os.devnull}
    done = subprocess.run([*pip, *options, what], capture_output=True, text=True, check=False, env=variables)
    assert done.returncode == 0, done.stderr
    found = json.loads(report.read_text(encoding="utf-8"))["install"]
    return {canonicalize_name(one["metadata"]["name"]): one["metadata"]["version"] for one in found}


@pytest.mark.parametrize("version", ["2.6.0", "2.15.0+cu130"])
def test_an_install_leaves_the_torch_that_is_there(version: str, index: Path, empty: Path) -> None:
    what = f"{PROJECT['name']}[record,examples]"
    found = fetched(index, empty, {"torch": version}, what)
    assert "torch" not in found
    assert {PROJECT["name"], "pytorch-lightning", "transformers", "pyarrow"} <= found.keys()


def test_an_older_torch_is_replaced(index: Path, empty: Path) -> None:
    assert fetched(index, empty, {"torch": "2.5.1"}, PROJECT["name"])["torch"] == NEWEST_TORCH


def test_no_package_that_is_installed_with_it_refuses_a_torch_from_the_oldest_on() -> None:
    requires = {name: one.requires or () for name, one in needed(PROJECT["dependencies"]).items()}
    found = [
        (name, requirement.specifier)
        for name, entries in [(PROJECT["name"], PROJECT["dependencies"]), *requires.items()]
        for requirement in map(Requirement, entries)
        if requirement.name == "torch" and (requirement.marker is None or requirement.marker.evaluate({"extra": ""}))
    ]
    assert {PROJECT["name"], "pytorch-lightning", "torchmetrics"} <= {name for name, _ in found}
    versions_of_torch = [f"2.{minor}.{patch}" for minor in range(6, 30) for patch in (0, 1)]
    for version in [*versions_of_torch, "2.6.0+cpu", "2.14.1+cu130", "2.13.0a0+df5bbc09d1"]:
        assert [name for name, one in found if not one.contains(version, prereleases=True)] == []
    assert [name for name, one in found if not one.contains("2.5.1")] == [PROJECT["name"]]


def test_an_install_leaves_everything_that_is_new_enough(index: Path, empty: Path) -> None:
    found = fetched(index, empty, BOUNDS, f"{PROJECT['name']}[record]")
    assert not found.keys() & BOUNDS.keys()
    assert PROJECT["name"] in found


def test_the_bounds_are_the_versions_that_the_tests_ran_with() -> None:
    rows = versions.rows_of(versions.PAGE.read_text(encoding="utf-8"))
    # CI runs what is pinned.
    assert {"floor", "newest"} <= {row["environment"] for row in rows}
    for row in rows:
        # What failed, and why, stands below the table.
        assert int(row["passed"]) > 1000 > 50 * int(row["failed"])
    for row in (row for row in rows if row["environment"] == "floor"):
        for package in versions.SHOWN:
            assert Version(row[package]) == Version(BOUNDS[package])
    pythons = {".".join(row["Python"].split(".")[:2]) for row in rows}
    declared = {one.rpartition(" ")[2] for one in PROJECT["classifiers"] if one.startswith("Programming Language")}
    assert pythons <= declared


def test_a_row_takes_the_place_of_the_row_for_its_environment_and_python() -> None:
    def row(environment: str, python: str, passed: int) -> dict[str, Any]:
        return {**dict.fromkeys(versions.COLUMNS, "1"), "environment": environment, "Python": python, "passed": passed}

    page = f"Before.\n\n{versions.BEGIN}\n{versions.END}\n\nAfter.\n"
    once = versions.with_rows(page, [row("newest", "3.13.1", 1), row("floor", "3.11.7", 2), row("floor", "3.9.1", 3)])
    twice = versions.with_rows(once, [row("floor", "3.11.9", 4)])
    assert [(one["Python"], one["passed"]) for one in versions.rows_of(twice)] == [
        ("3.9.1", "3"),
        ("3.11.9", "4"),
        ("3.13.1", "1"),
    ]
    assert twice.startswith("Before.\n\n<!--")
    assert twice.endswith("-->\n\nAfter.\n")
    with pytest.raises(ValueError, match="no table of versions"):
        versions.with_rows("Before.", [])


@pytest.mark.parametrize(
    ("summary", "expected"),
    [
        ("3 passed, 2 warnings in 1.00s", (3, 0, 0)),
        ("2 failed, 30 passed, 4 skipped, 1 error in 99.17s (0:01:39)", (30, 4, 3)),
        ("3 passed, 2 errors in 1.00s", (3, 0, 2)),
        ("4 skipped in 0.1s", (0, 4, 1)),
        ("no result, exit code 4", (0, 0, 1)),
    ],
)
def test_counts_of_a_run(summary: str, expected: tuple[int, int, int]) -> None:
    assert tuple(versions.counts(summary).values()) == expected


@pytest.mark.parametrize("entry", ["numpy", "numpy<3", "numpy~=1.26", "numpy>=1.26,!=1.27"])
def test_a_bound_that_cannot_be_installed_is_an_error(entry: str) -> None:
    text = f'[project]\ndependencies = ["{entry}"]\noptional-dependencies = {{ record = [] }}\n'
    with pytest.raises(ValueError, match="expected NAME>=VERSION"):
        versions.lower_bounds(text)


def test_the_environments() -> None:
    assert "torch==2.6" in versions.constraints("floor")
    assert "setuptools<81" in versions.constraints("floor")
    assert versions.constraints("newest") == []
    installed = {canonicalize_name(one.metadata["Name"]) for one in distributions()}
    pinned = {line.partition("==")[0] for line in versions.constraints("pinned")}
    assert {canonicalize_name(one) for one in pinned} >= installed & BOUNDS.keys()
