"""A real TensorBoard for the tests, and what its GlobEnc plugin answers."""

import json
import os
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlencode

import tomllib  # type: ignore[import-not-found]  # from Python 3.11
from werkzeug.test import Client

ROOT = Path(__file__).parents[3]
PLUGIN = "/data/plugin/globenc"
PATIENCE = 120


class Answer(NamedTuple):
    """An HTTP answer, its JSON read if it is any."""

    code: int
    kind: str
    content: Any


@contextmanager
def tensorboard(logdir: Path, scratch: Path, *options: str, load_fast: str = "auto") -> Iterator[str]:
    """Start TensorBoard's own command on a folder; yields its address.

    Args:
        logdir: the folder, which need not exist.
        scratch: a folder for its output.
        *options: further ones of its command line.
        load_fast: ``"true"`` reads with the data server, ``"false"`` with TensorBoard's own reader.
    """
    _as_if_installed(scratch)
    output = scratch / "tensorboard.txt"
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(logdir), "--port", "0", "--host", "localhost"]
    command += ["--reload_interval", "1", "--load_fast", load_fast, *options]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(scratch), str(ROOT)])}
    with output.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, cwd=scratch, env=environment)
    try:
        yield _address(process, output)
    finally:
        process.terminate()
        process.wait(30)


def _as_if_installed(scratch: Path) -> None:
    """The entry points of pyproject.toml, found by TensorBoard whether or not the package is installed."""
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    folder = scratch / "globenc_lightning-0.dist-info"
    folder.mkdir(exist_ok=True)
    lines = [
        f"[{group}]\n" + "".join(f"{name} = {at}\n" for name, at in named.items()) for group, named in points.items()
    ]
    (folder / "entry_points.txt").write_text("\n".join(lines))
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: globenc-lightning\nVersion: 0\n")


def _address(process: "subprocess.Popen[bytes]", output: Path) -> str:
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        found = re.search(r"at (http://localhost:\d+)", output.read_text())
        if found:
            return found[1]
        assert process.poll() is None, output.read_text()
        time.sleep(0.1)
    raise AssertionError(f"TensorBoard did not start: {output.read_text()}")


def fetch(address: str, path: str, **arguments: Any) -> Answer:
    """Ask a TensorBoard process."""
    url = f"{address}{path}" + (f"?{urlencode(arguments)}" if arguments else "")
    try:
        with urllib.request.urlopen(url, timeout=PATIENCE) as response:
            return _answer(response.status, response.headers["Content-Type"], response.read())
    except urllib.error.HTTPError as error:
        return _answer(error.code, error.headers["Content-Type"], error.read())


def until_runs(address: str, count: int) -> list[dict[str, Any]]:
    """The runs with GlobEnc data, once there are so many."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        runs: list[dict[str, Any]] = fetch(address, f"{PLUGIN}/runs").content["runs"]
        if len(runs) >= count:
            return runs
        time.sleep(0.2)
    raise AssertionError(f"not {count} runs: {runs}")


def ask(client: Client, route: str, **arguments: Any) -> Answer:
    """Ask TensorBoard's application in this process; ``from_`` is ``from``."""
    named = {name.rstrip("_"): value for name, value in arguments.items()}
    response = client.get(f"{PLUGIN}/{route}", query_string=named)
    return _answer(response.status_code, response.headers["Content-Type"], response.data)


def _answer(code: int, kind: str, data: bytes) -> Answer:
    return Answer(code, kind, _strict(data) if kind == "application/json" else data)


def _strict(data: bytes) -> Any:
    """JSON as a browser reads it: NaN and Infinity are none."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    return json.loads(data, parse_constant=refuse)
