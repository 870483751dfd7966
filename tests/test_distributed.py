"""Trainings in several processes, each of them a small program of its own; a process that waits forever fails."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from globenc_lightning import METHODS, GlobEncCallback, attribute
from globenc_lightning.record.writing import RunRecord
from globenc_lightning.report.dashboard import store
from tests.training import Sentences, Steps, events, fit, said

ROOT = Path(__file__).parent.parent
PATIENCE = 180

pytestmark = pytest.mark.slow


def run(case: str, folder: Path, processes: int = 2, **options: Any) -> list[dict[str, Any]]:
    """What each process of a training wrote."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "tests.distributed_training", case, str(folder), "--processes", str(processes)]
    for name, value in options.items():
        command += [f"--{name}", str(value)]
    # A training within this process may have left where it met others.
    left = ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "NODE_RANK", "LOCAL_RANK")
    kept = (name for name in os.environ if name not in left and not name.startswith("SLURM"))
    environment = {name: os.environ[name] for name in kept}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    written = [folder / f"rank_{rank}.json" for rank in range(processes)]
    assert all(path.exists() for path in written), done.stderr[-2000:]
    return [json.loads(path.read_text()) for path in written]


def assert_close(left: Any, right: Any, tolerance: float) -> None:
    left, right = torch.tensor(left, dtype=torch.float64), torch.tensor(right, dtype=torch.float64)
    torch.testing.assert_close(left, right, rtol=tolerance, atol=tolerance, equal_nan=True)


def assert_same_rho(one: dict[str, Any], first: dict[str, Any]) -> None:
    """Every process remembers every rho, and the first one alone the rows."""
    for entry, other in zip(one["history"], first["history"], strict=True):
        assert (entry["step"], entry["by_example"]) == (other["step"], other["by_example"])
        assert list(other["rows"]) == list(other["by_example"])
        assert one is first or entry["rows"] == {}


def test_masked_copies_give_the_same_from_any_number_of_processes(tmp_path: Path) -> None:
    (alone,) = run("masked", tmp_path / "1", 1, dtype="float64", examples=7)
    ranks = run("masked", tmp_path / "2", 2, dtype="float64", examples=7)
    # Before the first step, at the first validation, and at every second one from there on.
    assert [one is not None for one in alone["faithfulness"]] == [True, True, False]
    assert sum(gain == gain for gain in alone["faithfulness"][0]["gain"]["N-Enc"]) >= 2
    for rank in ranks:
        for found, expected in zip(rank["faithfulness"][:2], alone["faithfulness"][:2], strict=True):
            for method in ("N-Enc", "W"):
                assert_close(found["gain"][method], expected["gain"][method], 1e-6)
            assert_close(found["span"], expected["span"], 1e-6)
            # The first process alone keeps what was masked.
            assert found["masked"] == (expected["masked"] if rank is ranks[0] else {})
        assert rank["faithfulness"][2] is None


@pytest.mark.parametrize(
    ("dtype", "tolerance", "examples", "numbers"), [("float64", 1e-12, 10, (2, 3)), ("float32", 1e-5, 2, (3,))]
)
def test_a_given_probe_has_the_same_figures_from_any_number_of_processes(
    tmp_path: Path, dtype: str, tolerance: float, examples: int, numbers: tuple[int, ...]
) -> None:
    (alone,) = run("given", tmp_path / "1", 1, dtype=dtype, examples=examples)
    assert [entry["step"] for entry in alone["history"]] == [0, 1, 3]
    for processes in numbers:
        ranks = run("given", tmp_path / str(processes), processes, dtype=dtype, examples=examples)
        for one in ranks:
            assert [entry["step"] for entry in one["history"]] == [0, 1, 3]
            assert one["probe"] == alone["probe"]
            for entry, expected in zip(one["history"], alone["history"], strict=True):
                for method in METHODS:
                    assert_close(entry["by_example"][method], expected["by_example"][method], tolerance)
                    if one is ranks[0]:
                        for row, wanted in zip(entry["rows"][method], expected["rows"][method], strict=True):
                            assert_close(row, wanted, tolerance)
            assert_same_rho(one, ranks[0])
            for tag in [tag for tag in one["monitored"] if tag.startswith("globenc")]:
                assert one["monitored"][tag] == ranks[0]["monitored"][tag]
        # One set of figures and pictures, as from a single process.
        assert [point[:2] for point in ranks[0]["logged"]] == [point[:2] for point in alone["logged"]]
        assert ranks[0]["images"] == alone["images"]
        assert all(one["images"] == [] for one in ranks[1:])


def test_a_probe_from_the_validation_loop_is_what_the_first_process_was_shown(tmp_path: Path) -> None:
    first, second = run("collected", tmp_path)
    # The sampler of two processes shows the first one every second row.
    assert first["probe"] == [Sentences().ids(index) for index in range(0, 12, 2)]
    assert first["probe"] == second["probe"]
    assert_same_rho(second, first)
    assert [entry["step"] for entry in first["history"]] == [0, 1, 3]


NOT_HERE = "ModelCallError: FailsInOne.forward(input_ids, attention_mask) raised ArithmeticError: not here"


def test_a_failure_in_one_process_is_a_missing_validation_in_all(tmp_path: Path) -> None:
    ranks = run("fails", tmp_path)
    for one in ranks:
        assert one["steps"] == 4
        assert [entry["step"] for entry in one["history"]] == [0, 3]
        assert one["missing"] == [1]
    (message,) = ranks[0]["messages"]
    assert f"in the process of rank 1: {NOT_HERE}" in message


def test_the_first_process_alone_writes_the_dashboard_s_records_of_all_examples(tmp_path: Path) -> None:
    ranks = run("recorded", tmp_path, examples=5)
    (file,) = (tmp_path / "board").glob("*tfevents*")
    log = events(file)
    records = {tag: log.Tensors(tag) for tag in log.Tags()["tensors"] if store.parsed_tag(tag)}
    wanted = {store.tag("globenc", "summary", one) for one in range(3)}
    assert set(records) == wanted | {store.tag("globenc", "detail", one) for one in (0, 2)}
    read = {tag: (point.step, point.tensor_proto.string_val[0]) for tag, (point,) in records.items()}
    assert [read[store.tag("globenc", "summary", one)][0] for one in range(3)] == [0, 1, 3]
    failed = store.summary_from_bytes(read[store.tag("globenc", "summary", 1)][1])
    assert isinstance(failed, store.Missing)
    for ordinal, entry in zip((0, 2), ranks[1]["history"], strict=True):
        summary = store.summary_from_bytes(read[store.tag("globenc", "summary", ordinal)][1])
        detail = store.detail_from_bytes(read[store.tag("globenc", "detail", ordinal)][1])
        assert isinstance(summary, store.Summary)
        assert_close(
            [rho[:, -1].tolist() for rho in summary.rho],
            [[row[-1] for row in entry["by_example"][method]] for method in METHODS],
            1e-6,
        )
        for method in METHODS:
            # Half of the examples were analysed by the other process.
            assert set(detail.rows[method]) == set(detail.maps[method]) == set(range(5))


def test_a_failure_in_one_process_ends_all_if_that_is_wanted(tmp_path: Path) -> None:
    first, second = run("fails_and_raises", tmp_path)
    assert first["error"] == f"GlobEncError: in the process of rank 1: {NOT_HERE}"
    assert second["error"] == NOT_HERE


@pytest.mark.parametrize("case", ["tuples", "dataclasses"])
def test_batches_of_any_form_have_figures_in_all_processes(case: str, tmp_path: Path) -> None:
    first, second = run(case, tmp_path)
    assert [entry["step"] for entry in first["history"]] == [0, 1, 3]
    assert_same_rho(second, first)
    assert first["messages"] == second["messages"] == []
    # The sampler of two processes shows the first one every second row.
    assert first["probe"] == second["probe"] == [Sentences(20).ids(index) for index in range(0, 10, 2)]
    if case == "tuples":
        module = Steps()
        torch.manual_seed(0)
        data = Sentences(20)
        batch = {key: torch.stack([data.rows[index][key] for index in range(0, 10, 2)]) for key in data.rows[0]}
        alone = attribute(module, batch, methods=METHODS).correlation
        for method in METHODS:
            assert_close(first["history"][0]["by_example"][method], alone[method].tolist(), 1e-5)


@pytest.mark.parametrize("case", ["gathers", "gathers_by_torch"])
def test_a_step_that_waits_for_other_processes_is_refused_in_words(case: str, tmp_path: Path) -> None:
    first, second = run(case, tmp_path)
    (message,) = first["messages"]
    assert "step exchanges tensors with the other processes" in message
    assert "devices=1" in message
    for one in (first, second):
        assert one["steps"] == 4
        assert one["history"] == []
        assert one["missing"] == [0, 1, 3]


def test_a_decision_that_is_found_in_one_process_alone_is_missing_in_all(tmp_path: Path) -> None:
    first, second = run("is_not_found", tmp_path)
    (message,) = first["messages"]
    assert "in the process of rank 1: " in message
    assert "ArithmeticError: not here" in message
    for one in (first, second):
        assert one["steps"] == 4
        assert one["history"] == []
        assert len(one["missing"]) >= 2


def test_a_probe_that_does_not_travel_between_processes_is_refused_in_words(tmp_path: Path) -> None:
    first, second = run("travels_not", tmp_path)
    (message,) = first["messages"]
    assert "NoTraveller" in message
    for one in (first, second):
        assert one["steps"] == 4
        assert one["history"] == []


def test_one_process_writes_the_record_of_all(tmp_path: Path) -> None:
    (alone,) = run("kept", tmp_path / "1", 1)
    first, second = run("kept", tmp_path / "2", 2)
    assert [entry["step"] for entry in alone["history"]] == [0, 1, 1, 3]
    for one in (first, second):
        assert [entry["step"] for entry in one["history"]] == [0, 1, 1, 3]
        assert one["messages"] == alone["messages"]
    records = [RunRecord(tmp_path / number / "record", "memory-version_0") for number in ("1", "2")]
    assert records[0].steps() == records[1].steps() == [0, 1, 3]
    files = [sorted(file.name for file in record.folder.rglob("*") if file.is_file()) for record in records]
    assert files[0] == files[1]
    for one, other in zip(*(record.entries() for record in records), strict=True):
        for method in METHODS:
            assert_close(one.by_example[method].tolist(), other.by_example[method].tolist(), 1e-5)
            for row, wanted in zip(one.rows[method], other.rows[method], strict=True):
                assert_close(row.tolist(), wanted.tolist(), 1e-5)


def test_a_callback_travels_into_spawned_processes_and_still_works_afterwards() -> None:
    callback = GlobEncCallback(Sentences(6).first(6), heatmap_examples=0)
    expected = GlobEncCallback(Sentences(6).first(6), heatmap_examples=0)
    with said() as messages:
        trainer = fit(Steps(), callback, strategy="ddp_spawn", devices=2, limit_train_batches=1)
    assert messages == []
    assert "globenc/spearman/N-Enc" in trainer.callback_metrics
    # What was found in those processes stays there; the figures come back.
    assert callback.history == []
    torch.manual_seed(0)
    module = Steps()
    fit(copy.deepcopy(module), callback)
    fit(copy.deepcopy(module), expected)
    assert torch.equal(callback.history[0].by_example["N-Enc"], expected.history[0].by_example["N-Enc"])
