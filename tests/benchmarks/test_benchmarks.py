"""Every benchmark with its smallest settings: it runs, and prints its table. No figure is looked at."""

import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from benchmarks import (
    common,
    correlation,
    dashboard,
    logging_cost,
    naive,
    overhead,
    record,
    resident,
    scaling,
    training,
)
from globenc_lightning import attribute

TINY = common.MODELS["tiny"]
THREADS = ["--threads", "1"]
WORDS = ["a", "dull", "film", "fine", "and", "moving", "slow", "story", "bright", "the", "cast", "is"]
SPREAD = re.compile(r"\d+\.\d+ \[\d+\.\d+-\d+\.\d+\]")


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    folder = tmp_path / "encoder"
    vocabulary = {token: index for index, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]"
    ).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=TINY.hidden,
        num_hidden_layers=TINY.layers,
        num_attention_heads=TINY.heads,
        intermediate_size=TINY.intermediate,
        max_position_embeddings=TINY.positions,
    )
    BertModel(config).save_pretrained(folder)
    return folder


def rows_below(printed: str, title: str) -> list[str]:
    """The rows of the table whose title begins so."""
    lines = printed.splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith(title))
    rows = lines[start + 2 :]
    return rows[: rows.index("")] if "" in rows else rows


def assert_says_where(printed: str) -> None:
    assert re.match(rf".+, {os.cpu_count()} cores, 1 threads, load \d+\.\d before the start", printed)
    assert f"torch {torch.__version__}" in printed


def figures_of(file: Path) -> dict[str, object]:
    content = json.loads(file.read_text(encoding="utf-8"))
    assert set(content) == {"machine", "options", "results"}
    assert content["machine"]["threads"] == 1
    results = content["results"]
    assert isinstance(results, dict)
    return results


def test_overhead(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def in_this_process(job: str, dimensions: common.Dimensions, batch: int, length: int, threads: int) -> object:
        return resident.measure(job, dimensions, batch, length)

    monkeypatch.setattr(resident, "in_fresh_process", in_this_process)
    sizes = ["--model", "tiny", "--batch", "1", "2", "--length", "8", "--pairs", "2", "--memory-at", "2x8"]
    overhead.main([*THREADS, *sizes, "--json", str(tmp_path / "out.json")])

    printed = capsys.readouterr().out
    assert_says_where(printed)
    rows = rows_below(printed, "Analysis against the bare forward and backward")
    assert [row.split()[:3] for row in rows] == [["tiny", b, "8"] for b in "12" for _ in range(4)]
    assert all(len(SPREAD.findall(row)) == 3 for row in rows)
    assert len(rows_below(printed, "The first call")) == 2
    assert len(rows_below(printed, "Peak resident memory")) == len(resident.JOBS)
    results = figures_of(tmp_path / "out.json")
    assert len(results["time"]) == 2 * (4 + 1)
    assert len(results["time"][0]["first_seconds"]) == 2
    assert [one["job"] for one in results["memory"]] == list(resident.JOBS)


def test_memory_is_measured_in_a_process_of_its_own() -> None:
    ballast = torch.ones(100_000_000)
    found = resident.in_fresh_process("N-Enc", TINY, 2, 8, threads=1)
    assert 50e6 < found.loaded <= found.peak
    assert found.above < ballast.numel() * ballast.element_size()


def test_a_fresh_process_that_fails_says_why() -> None:
    with pytest.raises(RuntimeError, match="no-such-thing"):
        common.run_fresh("json.tool", ["no-such-thing"])


def test_naive(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--model", "tiny", "--batch", "2", "--length", "8", "--pairs", "2", "--definition"]
    naive.main([*THREADS, *sizes, "--json", str(tmp_path / "out.json")])

    printed = capsys.readouterr().out
    assert_says_where(printed)
    assert len(rows_below(printed, "N-Enc, seconds")) == 2
    assert [one["form"] for one in figures_of(tmp_path / "out.json")["time"]] == list(naive.FORMS)


def test_naive_leaves_out_what_does_not_fit(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(naive, "bytes_free", lambda: 1000)
    naive.main([*THREADS, "--model", "tiny", "--batch", "2", "--length", "8"])
    assert "tiny, b = 2, s = 8: left out" in capsys.readouterr().out


def test_naive_leaves_the_model_as_it_was() -> None:
    model = common.build_model(TINY)
    naive.plain(model, common.random_inputs(TINY, 2, 8))
    assert model.config._attn_implementation == "sdpa"
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_scaling(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--model", "tiny", "--batch", "1", "--length", "8", "--lengths", "8", "16", "128", "--batches", "1", "2"]
    counts = ["--layers", "1", "--layer-counts", "1", "2", "--head-counts", "2", "3", "4", "--pairs", "2"]
    scaling.main([*THREADS, *sizes, *counts, "--no-memory", "--json", str(tmp_path / "out.json")])

    printed = capsys.readouterr().out
    assert_says_where(printed)
    for axis in scaling.AXES:
        rows = rows_below(printed, f"Time against {axis}")
        assert sum(len(SPREAD.findall(row)) == 3 for row in rows) == 2
        assert f"fitted exponent in {axis}: bare" in printed
    assert set(figures_of(tmp_path / "out.json")) == set(scaling.AXES)


def test_scaling_of_memory(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def invented(job: str, dimensions: common.Dimensions, batch: int, length: int, threads: int) -> resident.Resident:
        return resident.Resident(10_000_000, 10_000_000 + batch * length**2 * 10_000)

    monkeypatch.setattr(resident, "in_fresh_process", invented)
    scaling.main(
        [
            *THREADS,
            "--model",
            "tiny",
            "--layers",
            "1",
            "--batch",
            "1",
            "--axis",
            "tokens",
            "--lengths",
            "8",
            "16",
            "32",
            "--pairs",
            "1",
        ]
    )
    printed = capsys.readouterr().out
    assert len(rows_below(printed, "Peak memory against tokens")) == 4
    assert printed.endswith("fitted exponent in tokens: bare 2.00, ours 2.00\n")


def test_correlation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--examples", "3", "--layers", "2", "--tokens", "12", "--pairs", "2"]
    correlation.main([*THREADS, *sizes, "--json", str(tmp_path / "out.json")])

    printed = capsys.readouterr().out
    assert_says_where(printed)
    assert len(rows_below(printed, "3 examples x 2 layers x 8 methods, 12 tokens")) == 2
    assert all(one["difference"] <= 1e-12 for one in figures_of(tmp_path / "out.json")["correlation"])


def test_correlation_that_differs_ends_with_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    true = correlation.ours
    monkeypatch.setattr(correlation, "ours", lambda given: true(given) + 1e-9)
    with pytest.raises(SystemExit, match="differ by more than 1e-12"):
        correlation.main([*THREADS, "--examples", "3", "--layers", "2", "--tokens", "12", "--pairs", "1"])


def test_logging_cost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--examples", "3", "--drawn", "2", "--tokens", "5", "--layers", "2", "--validations", "1", "3"]
    logging_cost.main([*THREADS, *sizes, "--pairs", "2", "--json", str(tmp_path / "out.json")])

    printed = capsys.readouterr().out
    assert_says_where(printed)
    rows = rows_below(printed, "One validation: 3 examples, 2 drawn, 5 tokens, 2 layers, 8 methods")
    assert all(len(SPREAD.findall(row)) == 2 for row in rows)
    named = [row.partition("  ")[0] for row in rows]
    assert named[0] == "history entry"
    assert named[-1] == "total"
    assert {f"{kind}: {part}" for kind in logging_cost.KINDS for part in ("draw", "write")} < set(named)
    assert "The first writing in a process" in printed
    # Every part was really run, and nothing was counted twice.
    results = figures_of(tmp_path / "out.json")["validations"]
    for one in [one for several in results.values() for one in several]:
        assert min(one.values()) > 0
        assert sum(one.values()) == pytest.approx(2 * one["total"])
    assert [row.split()[0] for row in rows_below(printed, "One validation: kB")][-2:] == ["pictures", "total"]
    for sizes in figures_of(tmp_path / "out.json")["bytes"].values():
        assert min(sizes.values()) > 0
        assert sizes["pictures"] == sum(sizes[kind] for kind in logging_cost.KINDS) < sizes["total"]


def test_logging_cost_of_two_checkouts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other"
    shutil.copytree(common.ROOT / "globenc_lightning", other / "globenc_lightning")
    source = other / "globenc_lightning" / "report" / "png.py"
    changed = source.read_text(encoding="utf-8").replace("\nLEVEL = 6\n", "\nLEVEL = 0\n")
    assert changed != source.read_text(encoding="utf-8")
    source.write_text(changed, encoding="utf-8")
    sizes = ["--examples", "2", "--drawn", "1", "--tokens", "5", "--layers", "2", "--validations", "2"]
    asked = ["--against", str(other), "--pairs", "2", "--json", str(tmp_path / "out.json")]
    logging_cost.main([*THREADS, *sizes, *asked])

    printed = capsys.readouterr().out
    rows = rows_below(printed, "2 examples, 1 drawn, 5 tokens, 2 layers, 8 methods, after 2 validations: milliseconds")
    kinds = len(logging_cost.KINDS)
    assert [row.split("  ")[0] for row in rows][kinds:] == [
        "all pictures",
        "the whole validation",
        "its processor time",
    ]
    assert all(len(SPREAD.findall(row)) == 3 for row in rows)
    pairs = figures_of(tmp_path / "out.json")["against"]["2"]
    assert len(pairs) == 1 + 2
    # Each process has the package of its own checkout: that of the other one compresses nothing.
    before, after = (one["bytes"] for one in pairs[0])
    assert all(before[kind] > 5 * after[kind] for kind in logging_cost.KINDS)
    assert before["scalars"] == after["scalars"]


def test_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--examples", "6", "--tokens", "5", "--layers", "2", "--validations", "2", "--long", "8"]
    record.main([*THREADS, *sizes, "--pairs", "2", "--json", str(tmp_path / "out.json")])

    printed = capsys.readouterr().out
    assert_says_where(printed)
    assert len(rows_below(printed, "6 examples x 5 tokens x 2 layers x N-Enc and N-Res, 2 validations")) == 10
    results = figures_of(tmp_path / "out.json")
    for one in results["large"].values():
        assert min(one["validation bytes"], one["probe bytes"], one["first write"], *one["writes"]) > 0
        assert all(len(seconds) == 2 and min(seconds) > 0 for seconds in one["reads"].values())
    # Without a record a checkpoint grows with every validation; with one it does not, but for the digits of a step.
    without, pointed = zip(*results["checkpoints"].values(), strict=True)
    assert [*results["checkpoints"]] == ["1", "2", "4", "8"]
    assert without[-1] > 4 * without[0]
    assert pointed[-1] <= pointed[0] + 64


def test_dashboard(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--validations", "3", "--sentences", "2", "--layers", "2", "--tokens", "6", "--pairs", "2"]
    dashboard.main([*THREADS, *sizes, "--json", str(tmp_path / "out.json")])

    printed = capsys.readouterr().out
    assert_says_where(printed)
    title = "3 validations, 2 sentences of 6 tokens, 2 layers, 8 methods: "
    kinds = [row.partition("  ")[0] for row in rows_below(printed, f"{title}kB per validation")]
    assert kinds == ["summary", "detail", "pictures", "all, at the last validation"]
    rows = rows_below(printed, f"{title}answers")
    assert {"index, the first time", "detail, another validation", "movement"} < {
        row.partition("  ")[0] for row in rows
    }
    results = figures_of(tmp_path / "out.json")
    assert len(results["bytes"]["detail"]) == len(results["bytes"]["summary"]) == 3
    assert min(min(sizes) for sizes in results["bytes"].values()) > 0
    assert all(seconds > 0 and size > 0 for several in results["answers"].values() for seconds, size in several)


def test_training(encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "sentences.tsv"
    lines = [f"{'bad' if index % 2 else 'good'}\t{WORDS[index % 12]} film" for index in range(40)]
    data.write_text("\n".join(["label\ttext", *lines]) + "\n", encoding="utf-8")
    sizes = ["--train-size", "16", "--val-size", "8", "--batch-size", "4", "--validations", "2", "--pairs", "1"]
    files = ["--model", str(encoder), "--data", str(data), "--json", str(tmp_path / "out.json")]
    training.main([*THREADS, *sizes, *files, "--same-process"])

    printed = capsys.readouterr().out
    assert_says_where(printed)
    assert len(rows_below(printed, "Fine-tuning, 3 analyses in each")) == 1
    hooks = rows_below(printed, "The callback's hooks")
    assert {"on_train_start", "on_validation_batch_end"} <= {row.split()[0] for row in hooks}
    results = figures_of(tmp_path / "out.json")
    assert results["without"][0]["analyses"] == 0
    assert 0 < sum(results["with"][0]["hooks"].values()) < results["with"][0]["fit"]


def test_quick_gives_way_to_options_on_the_same_command_line() -> None:
    parser = common.arguments_parser("Doc.", pairs=9, seconds=1.0)
    common.add_models(parser, ["base"])
    options = common.parse(parser, ["--quick", "--pairs", "4"], {"model": ["minilm"], "pairs": 2})
    assert (options.model, options.pairs) == (["minilm"], 4)


@pytest.mark.parametrize("option", ["--pairs", "--threads"])
def test_sizes_below_one_are_refused(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        correlation.main([option, "0"])
    assert "has to be at least 1, not 0" in capsys.readouterr().err


def test_floor_is_the_gradient_of_the_analysis_and_leaves_nothing_behind() -> None:
    model, inputs = common.build_model(TINY), common.random_inputs(TINY, 2, 8)
    floor = common.Floor(model, inputs)
    common.check_floor(floor, attribute(model, inputs))
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())
    other = attribute(model, common.random_inputs(TINY, 2, 8, seed=1))
    with pytest.raises(RuntimeError, match="different gradients"):
        common.check_floor(floor, other)


def test_jobs_alternate_and_only_they_are_timed() -> None:
    seen: list[str] = []
    pairs = common.in_pairs(
        lambda: seen.append("first"),
        lambda: seen.append("second"),
        pairs=2,
        seconds=60.0,
        before=lambda: seen.append("-"),
    )
    assert seen == ["-", "first", "-", "second"] * 2
    assert len(pairs.ratios) == 2
    assert len(common.in_pairs(list, list, pairs=99, seconds=0.0).first) == common.FEWEST_PAIRS


def test_nudge_moves_the_weights_and_comes_back() -> None:
    model = common.build_model(TINY)
    weight = model.bert.encoder.layer[0].attention.output.dense.weight
    before = weight.detach().clone()
    nudge = common.Nudge(model)
    nudge()
    assert not torch.allclose(weight, before)
    nudge()
    torch.testing.assert_close(weight.detach(), before)


@pytest.mark.parametrize(("power", "sizes"), [(2.0, (8, 16, 64)), (0.0, (1, 2, 3)), (1.5, (1, 4))])
def test_exponent(power: float, sizes: Sequence[int]) -> None:
    assert common.exponent(sizes, [3 * size**power for size in sizes]) == pytest.approx(power, abs=1e-9)


@pytest.mark.slow
def test_browser(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    browser = pytest.importorskip("benchmarks.browser")
    browser.main(["--quick", *THREADS, "--json", str(tmp_path / "figures.json")])
    printed = capsys.readouterr().out
    assert_says_where(printed)
    rows = rows_below(printed, "2 runs of 3 validations")
    assert [row.split("  ")[0] for row in rows if row.startswith(("first opened", "a step of the slider  "))] == [
        "first opened: the correlations",
        "first opened: all",
        "a step of the slider",
    ]
    figures = figures_of(tmp_path / "figures.json")
    # two tables and two answers about attributions, and nothing for a step of the slider; on a busy machine the tab's
    # own refresh, every ten seconds, may fall into an action and ask for what is new
    assert figures["first opened: all"][0]["requests"] >= 4  # type: ignore[index]
    assert min(one["requests"] for one in figures["a step of the slider"]) == 0  # type: ignore[attr-defined]
