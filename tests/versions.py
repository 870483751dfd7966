"""Runs the tests with the oldest, the pinned and the newest versions of what the package needs: ``make versions``.

Each set of versions gets an environment of its own. ``python tests/versions.py`` needs Python 3.11 or newer, the
package index, up to 10 GB of disk for an environment whose torch comes with CUDA, and as long as the tests take; what
stands after ``--`` goes to pytest. It writes a row per environment and version of Python into the table of
CONTRIBUTING.md, and leaves other rows as they are.
"""

import argparse
import datetime
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tomllib

ROOT = Path(__file__).parents[1]
PROJECT = ROOT / "pyproject.toml"
PINS = ROOT / "constraints.txt"
PAGE = ROOT / "CONTRIBUTING.md"
BEGIN, END = "<!-- versions: begin -->", "<!-- versions: end -->"
ENVIRONMENTS = ("floor", "pinned", "newest")
SHOWN = ("torch", "pytorch-lightning", "transformers", "numpy")
COLUMNS = ("environment", "Python", *SHOWN, "tests", "passed", "skipped", "failed", "run on")
# tensorboard below 2.21 imports pkg_resources, which setuptools no longer has from 81 on, and does not ask for it.
BESIDE_THE_FLOOR = ("setuptools<81",)
# The tests that stand closest to torch, transformers and Lightning.
CORE = (
    *("tests/test_requirements.py", "tests/functional", "tests/encoder", "tests/test_families.py"),
    *("tests/test_wrappers.py", "tests/test_own_attention.py", "tests/test_analysis.py", "tests/test_probe.py"),
    *("tests/test_tokenizers.py", "tests/test_measurement.py", "tests/test_callback.py"),
)
SELECTIONS: dict[str, tuple[str, ...]] = {"all": (), "core": CORE}


def lower_bounds(project: str) -> dict[str, str]:
    """Returns the oldest version that is declared of each package: of the dependencies, and of the extra ``record``.

    Args:
        project: the text of pyproject.toml.
    """
    declared = tomllib.loads(project)["project"]
    bounds = {}
    for entry in (*declared["dependencies"], *declared["optional-dependencies"]["record"]):
        bound = re.fullmatch(r"([\w-]+)>=([\d.]+)(,<[\d.]+)?", entry)
        if bound is None:
            raise ValueError(f"pyproject.toml: expected NAME>=VERSION or NAME>=VERSION,<VERSION, got {entry!r}")
        bounds[bound[1]] = bound[2]
    return bounds


def constraints(environment: str) -> list[str]:
    """Returns the lines of pip's constraints for an environment."""
    if environment == "floor":
        bounds = lower_bounds(PROJECT.read_text(encoding="utf-8"))
        return [*(f"{package}=={version}" for package, version in bounds.items()), *BESIDE_THE_FLOOR]
    if environment == "pinned":
        return [line for line in PINS.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    return []


def install(folder: Path, environment: str, interpreter: str) -> Path:
    """Makes an environment with the package and what its tests need, if it does not stand there; returns its Python."""
    python = folder / "bin" / "python"
    ready = folder / ".ready"
    if ready.exists():
        return python
    subprocess.run([interpreter, "-m", "venv", "--clear", str(folder)], check=True)
    lines = constraints(environment)
    pins = folder / "constraints.txt"
    pins.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    pip = [str(python), "-m", "pip", "install", "--quiet", "--constraint", str(pins)]
    # torch is named once more, as in the Makefile: the pin then also decides between builds of one version.
    torch = [line for line in lines if line.startswith("torch==")]
    subprocess.run([*pip, *torch, "--editable", ".[test]"], cwd=ROOT, check=True)
    ready.touch()
    return python


def installed(python: Path) -> dict[str, str]:
    """Returns the versions of Python and of the packages that the table shows, in an environment."""
    script = (
        "import json, platform, importlib.metadata as m; "
        f"print(json.dumps({{'Python': platform.python_version(), **{{n: m.version(n) for n in {SHOWN!r}}}}}))"
    )
    versions: dict[str, str] = json.loads(subprocess.check_output([str(python), "-c", script], text=True))
    return versions


def run(python: Path, options: list[str]) -> str:
    """Runs the tests; returns pytest's last line without its frame."""
    # This one compares the table that is about to be written with what is declared.
    deselected = "tests/test_requirements.py::test_the_bounds_are_the_versions_that_the_tests_ran_with"
    command = [str(python), "-m", "pytest", "-p", "no:cacheprovider", "--deselect", deselected, *options]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    last = ""
    for line in process.stdout:
        sys.stdout.write(line)
        sys.stdout.flush()
        last = line if re.search(r" in [\d.]+s", line) else last
    process.wait()
    return last.strip(" =\n") or f"no result, exit code {process.returncode}"


def counts(summary: str) -> dict[str, int]:
    """Returns how many tests passed, were skipped and failed (errors count as failures), from pytest's last line.

    A run without a result, or in which nothing passed, is one failure.
    """
    found = {word: int(number) for number, word in re.findall(r"(\d+) (passed|skipped|failed|error)", summary)}
    failed = found.get("failed", 0) + found.get("error", 0)
    passed = found.get("passed", 0)
    return {"passed": passed, "skipped": found.get("skipped", 0), "failed": failed or int(not passed)}


def rows_of(page: str) -> list[dict[str, str]]:
    """Returns the rows of the table between the marks of a page."""
    lines = [line.strip("|").split("|") for line in _block(page).splitlines() if line.startswith("|")]
    return [dict(zip(COLUMNS, (cell.strip() for cell in cells), strict=True)) for cells in lines[2:]]


def with_rows(page: str, new: Iterable[dict[str, Any]]) -> str:
    """Returns a page with rows added to its table; each takes the place of the row for its environment and Python."""
    rows = {_key(row): row for row in rows_of(page)}
    rows |= {_key(row): {name: str(value) for name, value in row.items()} for row in new}
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    lines += [f"| {' | '.join(rows[key][name] for name in COLUMNS)} |" for key in sorted(rows)]
    table = "\n".join(lines)
    before, _, rest = page.partition(BEGIN)
    return f"{before}{BEGIN}\n{table}\n{END}{rest.partition(END)[2]}"


def _key(row: dict[str, Any]) -> tuple[int, ...]:
    return ENVIRONMENTS.index(row["environment"]), *(int(part) for part in row["Python"].split(".")[:2])


def _block(page: str) -> str:
    _, begin, rest = page.partition(BEGIN)
    block, end, _ = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"the page has no table of versions: expected the lines {BEGIN} and {END}")
    return block


def main() -> int:
    """Runs everything, prints the rows and writes them; 1 if a test failed anywhere."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--environments", nargs="+", choices=ENVIRONMENTS, default=list(ENVIRONMENTS))
    parser.add_argument("--python", default=sys.executable, help="makes the environments (default: this one)")
    parser.add_argument("--tests", choices=SELECTIONS, default="all", help="core: those closest to the libraries")
    parser.add_argument("--folder", type=Path, help="keep the environments there, and use those that it has")
    parser.add_argument("options", nargs="*", help="for pytest, after --; with paths or -k, the table is not written")
    chosen = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        for environment in chosen.environments:
            print(f"\n=== {environment} ===", flush=True)
            try:
                python = install((chosen.folder or Path(temporary)).resolve() / environment, environment, chosen.python)
            except subprocess.CalledProcessError as error:
                print(f"{environment} could not be installed, exit code {error.returncode}")
                return 1
            summary = run(python, [*SELECTIONS[chosen.tests], *chosen.options])
            row = {"environment": environment, **installed(python), "tests": chosen.tests, **counts(summary)}
            rows.append({**row, "run on": datetime.date.today().isoformat()})
            print(rows[-1], flush=True)
            # A run that was narrowed is no proof of a version.
            if not any(re.match(r"-[km]|tests\b", option) for option in chosen.options):
                PAGE.write_text(with_rows(PAGE.read_text(encoding="utf-8"), rows), encoding="utf-8")
    return int(any(row["failed"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
