"""Functions of the tab's scripts that say what is shown of what, called in a real browser."""

from collections.abc import Iterator
from typing import Any

import pytest
from pytorch_lightning.loggers import TensorBoardLogger

from benchmarks.dashboard import large_run
from tests.report.dashboard.browser import Tab
from tests.report.dashboard.serving import PLUGIN, fetch, tensorboard, until_runs
from tests.report.kinds import train

pytestmark = pytest.mark.slow

CALL = """
    const [file, name, given, done] = arguments;
    const at = new URL(file, document.querySelector("link[rel=stylesheet]").href);
    import(at.href).then((module) => module[name](...given)).then(done, (error) => done(String(error)));
"""


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("functions") / "logs"
    large_run(folder, "plain", validations=2, sentences=3, layers=2, tokens=8)
    train("choice", TensorBoardLogger(str(folder), name=None, version="choice"), epochs=4, rate=2e-2)
    with tensorboard(folder, folder.parent) as address:
        until_runs(address, 2)
        yield address


def call(tab: Tab, file: str, name: str, *given: Any) -> Any:
    tab.open(run="plain")
    return tab.driver.execute_async_script(CALL, file, name, list(given))


@pytest.mark.parametrize(
    ("methods", "shown", "sentences", "said"),
    [
        pytest.param(["W"], [64], [{"W": 64}], "", id="all are stored"),
        pytest.param(["W"], [64], [{"W": 11}], " W is stored for 11 of 64 of them.", id="some are"),
        pytest.param(["W"], [64], [{}], " W is stored for 0 of 64 of them.", id="none is"),
        pytest.param(["W"], [64, 64], [{"W": 64}, {"W": 5}], " W is stored for 5 of 64 of them.", id="in one run"),
        # 12 of 64 are a smaller share than 10 of 20.
        pytest.param(["W"], [20, 64], [{"W": 10}, {"W": 12}], " W is stored for 12 of 64 of them.", id="share"),
        pytest.param(["W"], [2000], [{"W": 1234}], " W is stored for 1,234 of 2,000 of them.", id="thousands"),
        pytest.param(
            ["N", "N-Enc", "W"],
            [64],
            [{"N": 3, "N-Enc": 64, "W": 0}],
            " N is stored for 3 of 64 of them; W is stored for 0 of 64 of them.",
            id="two methods",
        ),
        pytest.param([], [64], [{"W": 3}], "", id="no method is drawn"),
        pytest.param(["W"], [], [], "", id="no run"),
    ],
)
def test_runs_say_of_how_many_sentences_a_method_is_stored(
    tab: Tab, methods: list[str], shown: list[int], sentences: list[dict[str, int]], said: str
) -> None:
    tables, answers = [{"shown": one} for one in shown], [{"sentences": one} for one in sentences]
    assert call(tab, "runs_view.js", "lackingOf", methods, tables, answers) == said


@pytest.mark.parametrize(
    ("before", "after", "found"),
    [
        pytest.param(({}, {"W": 4}), ({}, {"W": 4}), ({}, {"W": 4}), id="all"),
        pytest.param(({"3": ["N"]}, {"W": 3}), ({}, {"W": 4}), ({"3": ["N"]}, {"W": 3}), id="before"),
        pytest.param(({}, {"W": 4}), ({"1": []}, {"W": 3}), ({"1": []}, {"W": 3}), id="after"),
        # Three are stored at either end, and only two at both.
        pytest.param(
            ({"3": ["N"]}, {"W": 3, "N": 4}),
            ({"1": ["N"]}, {"W": 3, "N": 4}),
            ({"1": ["N"], "3": ["N"]}, {"W": 2, "N": 4}),
            id="other sentences",
        ),
        pytest.param(
            ({str(i): [] for i in range(4)}, {"W": 0, "N": 2}),
            ({}, {"W": 4, "N": 1}),
            ({str(i): [] for i in range(4)}, {"W": 0, "N": 1}),
            id="none before",
        ),
        pytest.param(
            ({}, {"W": 4, "N": 4}), ({}, {"W": 4}), ({}, {"W": 4, "N": 0}), id="a method that is absent after"
        ),
    ],
)
def test_movement_counts_what_is_stored_at_both_ends(tab: Tab, before: Any, after: Any, found: Any) -> None:
    ends = [
        {"instead": instead, "stored": stored, "room": room}
        for (instead, stored), room in zip((before, after), (1000, 2000), strict=True)
    ]
    answer = call(tab, "movement_view.js", "both", *ends, "W", 4)
    assert answer == {"instead": found[0], "stored": found[1], "room": 2000}


def test_movement_counts_no_sentence_that_showed_another_text(tab: Tab) -> None:
    tab.open(run="choice", view="movement")
    (run,) = (one for one in fetch(tab.address, f"{PLUGIN}/runs").content["runs"] if one["run"] == "choice")
    where = {"run": "choice", "tag": run["callbacks"][0]["tag"]}
    index = fetch(tab.address, f"{PLUGIN}/index", **where).content
    last = len(index["validations"]) - 1
    arguments = {"from": 0, "to": last, "method": index["drawn_method"], "layer": index["layers"] - 1}
    answer = fetch(tab.address, f"{PLUGIN}/movement", **where, **arguments).content["sentences"]
    others = [one["sentence"] for one in answer if one["other_text"]]
    assert 0 < len(others) < len(answer), "no other text is shown, or nothing else: the test shows nothing"
    assert tab.text(".share").startswith(f"{len(answer) - len(others)} of {len(answer)} sentences are compared.")
    rows = tab.all(".moved .sentence")
    assert [int(row.get_attribute("data-sentence") or -1) for row in rows] == [one["sentence"] for one in answer]
    for row, one in zip(rows, answer, strict=True):
        assert ("another text was shown" in row.text) == one["other_text"]
        assert ("1 − ρ" in row.text) == (not one["other_text"])
