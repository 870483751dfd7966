"""Runs tests of the callback where ``lightning`` is installed and ``pytorch_lightning`` is not: ``make lightning``.

The two packages have the same classes under two names, so the tests are copied with the one name for the other. What
stands after ``--`` goes to pytest.
"""

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
TESTS = ("test_callback.py", "test_trainer_flags.py", "test_checkpoints.py")


def copied(target: Path) -> None:
    """Copy the tests, what they take from the benchmarks, and pytest's configuration; one name for the other.

    In strings, names stay as they are.
    """
    for name in ("tests", "benchmarks"):
        shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", target)
    for path in target.rglob("*.py"):
        source = path.read_text(encoding="utf-8")
        path.write_text(re.sub(r"(?<![\"'])\bpytorch_lightning\b", "lightning.pytorch", source), encoding="utf-8")


def main() -> int:
    """Run them; pytest's exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("options", nargs="*", help="for pytest, after --")
    chosen = parser.parse_args()
    if importlib.util.find_spec("pytorch_lightning") is not None or importlib.util.find_spec("lightning") is None:
        print("This is about an environment with lightning and without pytorch_lightning: run `make lightning`.")
        return 1
    with tempfile.TemporaryDirectory() as folder:
        copied(Path(folder))
        tests = [f"tests/{name}" for name in TESTS]
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", "not slow", *tests]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([folder, str(ROOT)])}
        return subprocess.run([*command, *chosen.options], cwd=folder, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
