from pathlib import Path

import pytest

from globenc_lightning.record import schema


@pytest.mark.parametrize(("method", "layer"), [("N-Enc", 1), ("W-FixedRes", 12), ("N", 128)])
def test_columns_are_read_back(method: str, layer: int) -> None:
    for column in (schema.attribution_column(method, layer), schema.rho_column(method, layer)):
        assert schema.parsed_column(column) == (method, layer)


@pytest.mark.parametrize("column", ["step", "saliency", "label", "N-Enc/", "/x", "text_hash", "a/b"])
def test_other_columns_are_none_of_a_method(column: str) -> None:
    assert schema.parsed_column(column) is None


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("lightning_logs-version_0", "lightning_logs-version_0"),
        ("../../etc/passwd", "etc-passwd"),
        ("a/b\\c:d*?", "a-b-c-d"),
        ("überlauf 日本", "berlauf"),
        ("seed=1,lr=0.1", "seed-1-lr-0.1"),
        ("..", "run"),
        ("", "run"),
        ("\x00\n", "run"),
    ],
)
def test_a_run_s_name_can_stand_in_a_path(name: str, plain: str) -> None:
    assert schema.run_name(name) == plain
    assert schema.run_name(plain) == plain


def test_files_are_where_the_layout_says() -> None:
    folder = Path("record")
    assert schema.step_file(folder, "tokens", "a", 49) == Path("record/tokens/run=a/step-00000049.parquet")
    assert schema.step_file(folder, "examples", "a", 123456789) == Path("record/examples/run=a/step-123456789.parquet")
    assert schema.probe_file(folder, "a") == Path("record/probe/run=a/probe.parquet")
    assert schema.about_file(folder, "a") == Path("record/about/a.json")
    assert schema.step_of(schema.step_file(folder, "tokens", "a", 49)) == 49
    for other in (".step-00000049.parquet.7.part", "step-1.csv", "probe.parquet", "step--1.parquet"):
        assert schema.step_of(Path(other)) is None
