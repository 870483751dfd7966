"""The share of attribution on sets of tokens: against sums one example at a time, and how words are told."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest

from globenc_lightning import study
from globenc_lightning.errors import RecordError
from globenc_lightning.study.mass import SETS, marked_tokens, wanted_tokens
from tests.study.records import LENGTHS, write_run

SENTENCE_PIECES = ["[CLS]", "▁not", ",", "▁no", "body", "▁don", "'", "t", "▁go", "▁no", ".", "..", "[SEP]"]
WORD_PIECES = ["[CLS]", "Not", ",", "no", "##body", "don", "’", "t", "go", "no", ".", "##..", "[SEP]"]
WORDS_OF_PIECES = [None, 0, 0, 1, 1, 2, 2, 2, 3, 4, 4, 4, None]
WORDS_OF_WORD_PIECES = [None, 0, 1, 2, 2, 3, 4, 5, 6, 7, 8, 8, None]


def share(tokens: Sequence[str], words: Sequence[int | None], wanted: Any) -> list[str]:
    """Which tokens of one text are marked."""
    told = pandas.DataFrame(
        {
            "example": 0,
            "token": tokens,
            "word": pandas.array(words, dtype="Int32"),
            "special": [one.startswith("[") for one in tokens],
        }
    )
    marks = marked_tokens(told, wanted_tokens(wanted))
    return [f"{place}:{token}" for place, (token, mark) in enumerate(zip(tokens, marks, strict=True)) if mark]


@pytest.mark.parametrize(("tokens", "words"), [(SENTENCE_PIECES, WORDS_OF_PIECES), (WORD_PIECES, WORDS_OF_WORD_PIECES)])
@pytest.mark.parametrize(
    ("wanted", "places"),
    [
        ("not", [1]),
        (["NO"], [9]),
        ("nobody", [3, 4]),
        ("don't", None),
        ("negations", [1, 3, 4, 5, 6, 7, 9]),
        ("punctuation", [2, 6, 10, 11]),
        ("special", [0, 12]),
        (["special", "go"], [0, 8, 12]),
        ("body", []),
    ],
)
def test_whole_words_are_marked(
    tokens: list[str], words: list[int | None], wanted: Any, places: list[int] | None
) -> None:
    if places is None:
        # Words are those of the tokenizer: WordPiece cuts at the apostrophe.
        places = [5, 6, 7] if tokens is SENTENCE_PIECES else []
    if wanted == "negations":
        # "nobody" is among them.
        assert "nobody" in SETS["negations"]
    assert share(tokens, words, wanted) == [f"{place}:{tokens[place]}" for place in places]


def test_tokens_are_compared_by_themselves_where_words_are_not_known() -> None:
    tokens = ["not", "##no", "no", "body", "!"]
    assert share(tokens, [None] * 5, "not") == ["0:not"]
    assert share(tokens, [None] * 5, "punctuation") == ["4:!"]


@pytest.mark.parametrize("wanted", ["negations", "punctuation", "special", ["good", "plot"], "nobody"])
def test_mass_is_the_sum_over_the_tokens_of_one_example_at_a_time(tmp_path: Path, wanted: Any) -> None:
    runs = {f"seed-{seed}": write_run(tmp_path, f"seed-{seed}", seed=seed) for seed in (1, 2)}
    for run in runs.values():
        run.rows[20, "N-Enc", 1][3] = np.full(LENGTHS[3], np.nan)
        write_run(tmp_path, run.name, seed=int(run.name[-1]), rows=run.rows)
    found = study.load(tmp_path).mass(wanted)
    assert len(found) == 2 * 3 * len(LENGTHS) * 2 * 2
    names = {
        "negations": {"not", "no", "never"},
        "punctuation": {"!", "."},
        "special": {"[CLS]", "[SEP]"},
        "nobody": set(),
    }.get(wanted if isinstance(wanted, str) else "", {"good", "plot"})
    marked = 0
    for row in found.itertuples():
        run = runs[row.run]
        tokens, values = run.tokens[row.example], run.rows[row.step, row.method, row.layer][row.example]
        expected, size = 0.0, 0
        for place, (token, value) in enumerate(zip(tokens, values, strict=True)):
            after = tokens[place + 1] if place + 1 < len(tokens) else ""
            # "no" and "##body" are one word.
            whole = token == "no" and after == "##body"
            piece = token == "##body" and tokens[place - 1] == "no"
            is_in = token in names and not whole
            if wanted in ("negations", "nobody"):
                is_in = is_in or whole or piece
            expected += value if is_in else 0
            size += is_in
        assert row.mass == pytest.approx(expected / values.sum(), abs=1e-12, nan_ok=True)
        assert row.tokens == size
        marked += size
    assert marked > 0


def test_all_kinds_of_tokens_together_have_all_the_attribution(tmp_path: Path) -> None:
    run = write_run(tmp_path, "one")
    words = sorted({token for tokens in run.tokens for token in tokens if token[0].isalpha()})
    loaded = study.load(tmp_path)
    whole = loaded.mass(["special", "punctuation", *words, "nobody", "body"])["mass"]
    assert whole.to_numpy() == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("wanted", [[], "", ["not", 3], [None]])
def test_what_is_no_set_of_tokens_is_refused(tmp_path: Path, wanted: Any) -> None:
    write_run(tmp_path, "one")
    with pytest.raises(RecordError, match=r"'negations', 'punctuation', 'special'"):
        study.load(tmp_path).mass(wanted)
