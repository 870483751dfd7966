"""Models that are sharded by ``fully_shard``, in processes of their own; a process that waits forever fails."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from globenc_lightning.sharding import refusal
from tests.training import Steps

ROOT = Path(__file__).parent.parent
PATIENCE = 180

slow = pytest.mark.slow


def run(module: str, case: str, folder: Path, processes: int, *names: str) -> list[dict[str, Any]]:
    """What each process of a case wrote."""
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(processes)}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": "0"}
    command = [sys.executable, "-m", f"tests.{module}", case, str(folder), *names]
    started = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
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
@pytest.mark.parametrize(
    ("processes", "forms"),
    [
        (2, ("linears", "root, pre-LN", "layers without the root", "bfloat16", "checkpointed, pre-LN", "hybrid")),
        (3, ("layers", "bfloat16, pre-LN")),
    ],
    ids=["2", "3"],
)
def test_a_sharded_model_has_a_whole_one_s_figures_and_trains_on_as_if_it_had_not_been_analysed(
    processes: int, forms: tuple[str, ...], tmp_path: Path
) -> None:
    for rank in run("sharded_models", "analyses", tmp_path, processes, *forms):
        assert set(rank) == set(forms)
        for found in rank.values():
            # Before the first pass, between accumulated gradients, and after a pass without a backward one.
            assert [one["rho"] for one in found["differences"]] == [0.0, 0.0, 0.0]
            assert max(one["rows"] for one in found["differences"]) < 1e-6
            assert found["settings"] == [True, True, True]
            assert found["equal"]


@slow
def test_what_goes_wrong_in_one_process_leaves_a_sharded_model_as_it_was_in_all(tmp_path: Path) -> None:
    first, second = run("sharded_models", "troubles", tmp_path, 2)
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
    assert "within 3 s: call attribute() in all of them" in first["one alone"]["error"]


@slow
def test_what_is_spread_over_the_processes_in_another_way_is_refused_before_it_is_touched(tmp_path: Path) -> None:
    named = {
        "tensor parallelism": "by tensor parallelism (DTensor)",
        "both": "by tensor parallelism (DTensor)",
        "FSDP1": "by FullyShardedDataParallel (FSDP1)",
        "ZeRO-3": "by ZeRO stage 3 of DeepSpeed",
    }
    for rank in run("sharded_models", "refused", tmp_path, 2):
        assert set(rank) == set(named)
        for name, words in named.items():
            assert rank[name]["error"].startswith("UnsupportedEncoderError: this model's parameters are spread over")
            assert words in rank[name]["error"]
            assert "Shard it by fully_shard alone (FSDP2" in rank[name]["error"]
            assert rank[name]["equal"], name


@slow
@pytest.mark.parametrize(
    ("processes", "names", "examples"),
    [(2, ("post-LN", "pre-LN", "bfloat16"), 5), (3, ("post-LN",), 1)],
    ids=["2", "3, fewer examples than processes"],
)
def test_a_sharded_training_has_a_whole_model_s_figures_and_is_what_it_would_have_been(
    processes: int, names: tuple[str, ...], examples: int, tmp_path: Path
) -> None:
    ranks = run("sharded_training", "equal_trainings", tmp_path, processes, *names, "--examples", str(examples))
    steps = {"post-LN": [0, 1, 3], "pre-LN": [0, 0, 1, 2, 3], "bfloat16": [0, 1, 1, 3]}
    for rank in ranks:
        assert set(rank) == set(names)
        for name, found in rank.items():
            assert found["equal"], name
            assert found["steps"] == steps[name]
            assert found["missing"] == []
            # A remark on an extension of the paper, once.
            assert len(found["messages"]) == (name == "pre-LN" and rank is ranks[0])
            for place in ("first", "last"):
                assert found[place]["rho"] == 0.0, name
                assert found[place]["rows"] < 1e-6, name
            assert "globenc/spearman/N-Enc" in found["monitored"]


@slow
def test_a_validation_that_fails_in_one_process_is_missing_in_all_of_a_sharded_training(tmp_path: Path) -> None:
    ranks = run("sharded_training", "one_fails", tmp_path, 2)
    for rank in ranks:
        assert rank["failure"]["equal"]
        assert rank["failure"]["steps"] == [0, 3]
        assert rank["failure"]["missing"] == [1]
    (message,) = ranks[0]["failure"]["messages"]
    assert "in the process of rank 1: ModelCallError: ShardedAndFails.forward" in message


@slow
def test_a_sharded_training_is_resumed_and_validated(tmp_path: Path) -> None:
    for rank in run("sharded_training", "resumed", tmp_path, 2):
        assert set(rank) == {"shards", "one file"}
        for found in rank.values():
            # The second is made up for before the first step: the checkpoint is from before that validation.
            assert found["steps"] == found["uninterrupted"]["steps"] == [0, 1, 3]
            assert found["same"][:2] == [True, True]
            assert found["missing"] == found["messages"] == []
            assert found["equal"]
            assert found["validated"]["steps"] == [0]
            assert found["validated"]["rho"] == 0.0
            assert found["validated"]["rows"] < 1e-6


@slow
def test_a_training_by_tensor_parallelism_is_refused_with_one_warning(tmp_path: Path) -> None:
    first, second = run("sharded_training", "tensor_parallel", tmp_path, 2)
    (message,) = first["refused"]["messages"]
    assert message.startswith(
        "GlobEncCallback: this model's parameters are spread over the processes by tensor paralle"
    )
    for rank in (first, second):
        assert rank["refused"]["trained"] == 4
        assert rank["refused"]["steps"] == rank["refused"]["missing"] == []
        assert rank["refused"]["reasons"] == [message]


def test_a_whole_model_is_not_refused() -> None:
    assert refusal(Steps()) is None
