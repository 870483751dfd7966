"""A training on a disk that fills up, with and without ``GlobEncCallback``, run as ``python -m tests.full_disk``.

Writes to ``--result`` how both ended and whether they are the same to the last bit, as JSON. The limits are real ones,
and hold for this process alone: ``--disk`` mounts a file system of that size in a name space of its own (Linux),
``--longest`` limits how long a file may get.
"""

import argparse
import ctypes
import json
import os
import resource
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import TensorBoardLogger

from globenc_lightning import GlobEncCallback
from tests.neutrality import Noisy, equal
from tests.training import Sentences, build_trainer, final_state, loader, said

CLONE_NEWNS, CLONE_NEWUSER = 0x00020000, 0x10000000
MS_REC, MS_PRIVATE = 0x4000, 0x40000


def mount(folder: Path, size: int) -> None:
    """Put an empty file system of so many bytes at a folder, for this process alone.

    Raises:
        OSError: this machine does not allow it.
    """
    system = ctypes.CDLL(None, use_errno=True)
    user, group = os.getuid(), os.getgid()

    def checked(result: int) -> None:
        if result:
            raise OSError(ctypes.get_errno(), "no file system of one's own")

    checked(system.unshare(CLONE_NEWNS | CLONE_NEWUSER))
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {user} 1")
    Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    checked(system.mount(None, b"/", None, MS_REC | MS_PRIVATE, None))
    checked(system.mount(b"tmpfs", bytes(folder), b"tmpfs", 0, f"size={size}".encode()))


def train(folder: Path, callbacks: list[pl.Callback]) -> dict[str, Any]:
    """What a training leaves behind, its log's length included, and the error that ended it."""
    pl.seed_everything(3, verbose=False)
    module, logger = Noisy(), TensorBoardLogger(str(folder), name="", version="run")
    trainer = build_trainer(callbacks, logger=logger, max_epochs=4, log_every_n_steps=1)
    result: dict[str, Any] = {"error": ""}
    try:
        trainer.fit(module, loader(Sentences(32, seed=1), shuffle=True), loader(Sentences()))
    except Exception as error:
        result["error"] = type(error).__name__
    result["state"] = final_state(trainer) if trainer.optimizers else {}
    result["steps"] = trainer.global_step
    result["bytes"] = sum(one.stat().st_size for one in (folder / "run").glob("events*"))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("result", type=Path)
    parser.add_argument("--disk", type=int)
    parser.add_argument("--longest", type=int)
    options = parser.parse_args()
    result = options.result.open("w")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    ends: dict[str, dict[str, Any]] = {}
    callback = GlobEncCallback(heatmap_examples=1)
    try:
        if options.disk:
            mount(options.folder, options.disk)
    except OSError as error:
        json.dump({"impossible": str(error)}, result)
        return
    if options.longest:
        resource.setrlimit(resource.RLIMIT_FSIZE, (options.longest, resource.RLIM_INFINITY))
    for name, callbacks in (("without", []), ("with", [callback])):
        with said() as messages:
            ends[name] = train(options.folder, callbacks)
        for path in (options.folder / "run").iterdir():
            path.unlink()
    # The result's own file is outside of the folder, but as long as any.
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    json.dump(
        {
            "error": [one["error"] for one in ends.values()],
            "steps": [one["steps"] for one in ends.values()],
            "bytes": [one["bytes"] for one in ends.values()],
            "same": equal(ends["with"].pop("state"), ends["without"].pop("state")),
            "history": [entry.step for entry in callback.history],
            "messages": messages,
        },
        result,
    )
    # Not left to the end of the process: what a failed writer leaves behind may still hold this file then.
    result.close()


if __name__ == "__main__":
    main()
