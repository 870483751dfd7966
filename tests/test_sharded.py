"""Models that are sharded by ``fully_shard``, in processes of their own; a process that waits forever fails."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from globenc_lightning.sharding import refusal
from tests.training import Steps

ROOT = Path(__file__).parent.parent
PATIENCE = 400

slow = pytest.mark.slow
if not hasattr(torch.cpu.Stream, "record_event"):
    # On the CPU, a pass of a sharded model fails in torch before 2.7, whatever is done to it.
    pytestmark = pytest.mark.skip(reason="fully_shard of this torch does not run on the CPU")


def run(module: str, cases: str, folder: Path, processes: int, *names: str) -> list[dict[str, Any]]:
    """What each process of some cases wrote: starting processes takes longer than the cases do."""
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    own = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    shared = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(processes)}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": "0"}
    command = [sys.executable, "-m", f"tests.{module}", cases, str(folder), *names]
    started = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env={**own, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=(folder / f"said_{rank}.txt").open("w"),
        )
        for rank in range(processes)
    ]
    try:
        for one in started:
            one.wait(PATIENCE)
    finally:
        for one in started:
            one.kill()
            one.wait()
    said = "\n".join((folder / f"said_{rank}.txt").read_text()[-2000:] for rank in range(processes))
    written = [folder / f"rank_{rank}.json" for rank in range(processes)]
    assert all(path.exists() for path in written), said
    return [json.loads(path.read_text()) for path in written]


@slow
def test_sharded_models_have_a_whole_one_s_figures_and_stay_what_they_were_whatever_goes_wrong(tmp_path: Path) -> None:
    forms = ("linears", "root, pre-LN", "layers without the root", "bfloat16", "checkpointed, pre-LN", "hybrid")
    first, second = run("sharded_models", "analyses,troubles,refused", tmp_path, 2, *forms)
    for rank in (first, second):
        assert_equal_to_whole_ones(rank["analyses"], forms)
        assert_refused(rank["refused"])
    assert_untouched(first["troubles"], second["troubles"])


@slow
def test_three_processes_have_a_whole_model_s_figures_of_a_sharded_one(tmp_path: Path) -> None:
    forms = ("layers", "bfloat16, pre-LN")
    for rank in run("sharded_models", "analyses", tmp_path, 3, *forms):
        assert_equal_to_whole_ones(rank["analyses"], forms)


def assert_equal_to_whole_ones(found: dict[str, Any], forms: tuple[str, ...]) -> None:
    """The figures are a whole model's, the settings and the training what they would have been."""
    assert set(found) == set(forms)
    for name, one in found.items():
        # Before the first pass, between accumulated gradients, and after a pass without a backward one.
        assert [difference["rho"] for difference in one["differences"]] == [0.0, 0.0, 0.0], name
        assert max(difference["rows"] for difference in one["differences"]) < 1e-6, name
        assert one["settings"] == [True, True, True], name
        assert one["equal"], name


def assert_untouched(first: dict[str, Any], second: dict[str, Any]) -> None:
    """Each process says what went wrong, and the model trains on as if nothing had."""
    alone = "GlobEncError: this model is sharded by fully_shard over 2 processes"
    within = "GlobEncError: a forward or backward pass of this sharded model is under way"
    exchanges = "CollectiveError: the step exchanges tensors with the other processes"
    no_room = "OutOfMemoryError: the memory does not suffice for the whole weights of this sharded model"
    expected = {
        "one alone": (alone, ""),
        "all but one": ("", alone),
        "all": ("", ""),
        "one fails": ("", "ModelCallError: forward= raised ArithmeticError: not here"),
        "one is wrong": ("", "ModelCallError"),
        "exchanges": (exchanges, exchanges),
        "takes the state": ("", ""),
        "all again": ("", ""),
        "without room": (alone, no_room),
        "without room, together": (f"GlobEncError: in the process of rank 1: {no_room}", no_room),
        "within a forward": (within, within),
        "was whole": ("", ""),
        "after a pass in inference mode": ("", ""),
        "below inference mode": ("", ""),
    }
    assert set(first) == set(second) == set(expected)
    for name, errors in expected.items():
        for found, error in zip((first[name], second[name]), errors, strict=True):
            assert found["error"].startswith(error), name
            assert bool(found["error"]) == bool(error), name
            assert found.get("settings", True), name
            assert found.get("equal", True), name
    assert "within 5 s: call attribute() in all of them" in first["one alone"]["error"]


def assert_refused(found: dict[str, Any]) -> None:
    """What is spread over the processes in another way is refused before it is touched."""
    named = {
        "tensor parallelism": "by tensor parallelism (DTensor)",
        "both": "by tensor parallelism (DTensor)",
        "FSDP1": "by FullyShardedDataParallel (FSDP1)",
        "ZeRO-3": "by ZeRO stage 3 of DeepSpeed",
    }
    assert set(found) == set(named)
    for name, words in named.items():
        assert found[name]["error"].startswith("UnsupportedEncoderError: this model's parameters are spread over")
        assert words in found[name]["error"]
        assert "Shard it by fully_shard alone (FSDP2" in found[name]["error"]
        assert found[name]["equal"], name


@slow
def test_sharded_trainings_have_a_whole_model_s_figures_and_are_what_they_would_have_been(tmp_path: Path) -> None:
    ranks = run("sharded_training", "equal_trainings,one_fails,resumed,tensor_parallel", tmp_path, 2)
    for rank in ranks:
        assert_equal_trainings(rank["equal_trainings"], ("post-LN", "pre-LN", "bfloat16"))
        assert_resumed(rank["resumed"])
        # One that fails in one process is missing in all.
        assert rank["one_fails"]["failure"]["equal"]
        assert rank["one_fails"]["failure"]["steps"] == [0, 3]
        assert rank["one_fails"]["failure"]["missing"] == [1]
    (message,) = ranks[0]["one_fails"]["failure"]["messages"]
    assert "in the process of rank 1: ModelCallError: ShardedAndFails.forward" in message
    # A remark on an extension of the paper, once.
    said = [len(ranks[0]["equal_trainings"][name]["messages"]) for name in ("post-LN", "pre-LN", "bfloat16")]
    assert said == [0, 1, 0]
    refused = [rank["tensor_parallel"]["refused"] for rank in ranks]
    (message,) = refused[0]["messages"]
    assert message.startswith("GlobEncCallback: this model's parameters are spread over the processes by tensor")
    for one in refused:
        assert one["trained"] == 4
        assert one["steps"] == one["missing"] == []
        assert one["reasons"] == [message]


@slow
def test_a_sharded_training_of_three_processes_analyses_fewer_examples_than_there_are_processes(tmp_path: Path) -> None:
    for rank in run("sharded_training", "equal_trainings", tmp_path, 3, "post-LN", "--examples", "1"):
        assert_equal_trainings(rank["equal_trainings"], ("post-LN",))


def assert_equal_trainings(trainings: dict[str, Any], names: tuple[str, ...]) -> None:
    """The figures are a whole model's, and the bits those of a training without a callback."""
    steps = {"post-LN": [0, 1, 3], "pre-LN": [0, 0, 1, 2, 3], "bfloat16": [0, 1, 1, 3]}
    assert set(trainings) == set(names)
    for name, found in trainings.items():
        assert found["equal"], name
        assert found["steps"] == steps[name]
        assert found["missing"] == []
        for place in ("first", "last"):
            assert found[place]["rho"] == 0.0, name
            assert found[place]["rows"] < 1e-6, name
        assert "globenc/spearman/N-Enc" in found["monitored"]
        # Half precision rounds the whole model's matrices as it does those of shards.
        assert found["masked"] < (1e-5 if name != "bfloat16" else 1e-2), name


def assert_resumed(found: dict[str, Any]) -> None:
    """A training goes on from a checkpoint, and a validation on its own has a whole model's figures."""
    assert set(found) == {"shards", "one file"}
    for one in found.values():
        # The second is made up for before the first step: the checkpoint is from before that validation.
        assert one["steps"] == one["uninterrupted"]["steps"] == [0, 1, 3]
        assert one["same"][:2] == [True, True]
        assert one["missing"] == one["messages"] == []
        assert one["equal"]
        assert one["validated"]["steps"] == [0]
        assert one["validated"]["rho"] == 0.0
        assert one["validated"]["rows"] < 1e-6


def test_a_whole_model_is_not_refused() -> None:
    assert refusal(Steps()) is None
