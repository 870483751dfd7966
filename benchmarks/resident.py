"""Peak resident memory of one job in a fresh process, for the other benchmarks.

    python -m benchmarks.resident JOB BATCH LENGTH THREADS LAYERS HIDDEN HEADS INTERMEDIATE VOCABULARY POSITIONS

prints one line of JSON. The job is run three times, as a first call needs more than the others.
"""

import gc
import json
import resource
import sys
from collections.abc import Sequence
from dataclasses import astuple
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.common import METHOD_SETS, Dimensions, Floor, build_model, random_inputs, run_fresh
from globenc_lightning import METHODS, ProbeSet, attribute
from globenc_lightning.analysis import Reader
from globenc_lightning.measurement import measure as measure_probe
from globenc_lightning.settings import Settings

ROWS_ONLY = "all eight, rows only"
"""As the callback does it: the readout rows and the last rollout are kept, the maps of the layers are not."""

JOBS = ("bare", *METHOD_SETS, ROWS_ONLY)
CALLS = 3
MEGABYTE = 1e6


class Resident(NamedTuple):
    """Resident memory of a process in bytes.

    Attributes:
        loaded: with the libraries and the model loaded.
        peak: the most there ever was.
    """

    loaded: int
    peak: int

    @property
    def above(self) -> int:
        """What the job took above the loaded model."""
        return self.peak - self.loaded


def in_fresh_process(job: str, dimensions: Dimensions, batch: int, length: int, threads: int) -> Resident:
    """Measure a job in a process of its own.

    Args:
        job: one of ``JOBS``.
        dimensions: of the model.
        batch: number of examples.
        length: number of tokens of each.
        threads: CPU threads.
    """
    sizes = [batch, length, threads, *astuple(dimensions)]
    return Resident(**run_fresh("benchmarks.resident", [job, *map(str, sizes)]))


def measure(job: str, dimensions: Dimensions, batch: int, length: int) -> Resident:
    """Measure a job in this process, which has done nothing before.

    Args:
        job: one of ``JOBS``.
        dimensions: of the model.
        batch: number of examples.
        length: number of tokens of each.
    """
    model, inputs = build_model(dimensions), random_inputs(dimensions, batch, length)
    gc.collect()
    loaded = _resident_now()
    if job == "bare":
        floor = Floor(model, inputs)
        with floor.around():
            for _ in range(CALLS):
                floor.run()
    elif job == ROWS_ONLY:
        reader, probe = Reader(model), ProbeSet.from_batch(inputs)
        for _ in range(CALLS):
            measure_probe(reader, probe, Settings(METHODS))
    else:
        for _ in range(CALLS):
            attribute(model, inputs, methods=METHOD_SETS[job])
    return Resident(loaded, _resident_peak())


def _resident_now() -> int:
    status = _status("VmRSS")
    # Elsewhere than on Linux nobody tells: the peak so far is the nearest.
    return _resident_peak() if status is None else status


def _resident_peak() -> int:
    """The peak of this process itself; ``ru_maxrss`` of a child process starts at what its parent had."""
    status = _status("VmHWM")
    if status is not None:
        return status
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _status(name: str) -> int | None:
    path = Path("/proc/self/status")
    if path.is_file():
        for line in path.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    return None


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print what was found.

    Args:
        arguments: the command line; that of the process if not given.
    """
    job, *sizes = sys.argv[1:] if arguments is None else arguments
    batch, length, threads, *dimensions = map(int, sizes)
    torch.set_num_threads(threads)
    print(json.dumps(measure(job, Dimensions(*dimensions), batch, length)._asdict()))


if __name__ == "__main__":
    main()
