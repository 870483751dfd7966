"""Tests which tokens a set of texts stands for, and that their share is that of a loop."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest

from globenc_lightning import study
from globenc_lightning.errors import RecordError
from globenc_lightning.record.words import word_numbers
from globenc_lightning.study.matching import SETS, marked_tokens, wanted_tokens
from tests.study.records import write_run


def told(tokens: str, known: bool = True) -> Any:
    """A probe of one example, whose tokens are given with spaces between them."""
    names = tokens.split()
    special = [one in ("[CLS]", "[SEP]", "<s>", "</s>") if known else None for one in names]
    words = word_numbers(names, special)
    return pandas.DataFrame({"example": 0, "token": names, "special": special, "word": words})


def found(tokens: str, *wanted: str, known: bool = True) -> str:
    """The tokens that were found."""
    marks = marked_tokens(told(tokens, known), wanted_tokens(wanted))
    return " ".join(name for name, mark in zip(tokens.split(), marks, strict=True) if mark)


@pytest.mark.parametrize(
    ("tokens", "wanted", "expected"),
    [
        # A piece of a word is not the word.
        ("[CLS] no ##body is not no [SEP]", ["no"], "no"),
        ("[CLS] no ##body is not no [SEP]", ["nobody"], "no ##body"),
        ("[CLS] no ##body is not no [SEP]", ["##body"], "##body"),
        ("[CLS] no ##body is not no [SEP]", ["body"], ""),
        ("<s> ▁no body ▁no </s>", ["no"], "▁no"),
        ("<s> ▁no body ▁no </s>", ["NOBODY"], "▁no body"),
        ("<s> ▁no body ▁no </s>", ["body"], ""),
        ("no body</w> no</w>", ["no"], "no</w>"),
        ("no body</w> no</w>", ["nobody"], "no body</w>"),
        # Punctuation ends a word, whether the tokenizer cut it off or not.
        ("<s> ▁is ▁not , ▁good . </s>", ["not"], "▁not"),
        ("<s> ▁is ▁not , ▁good . </s>", ["."], "."),
        ("<s> ▁is ▁not , ▁good . </s>", ["punctuation"], ", ."),
        ("[CLS] not , good . . . [SEP]", ["punctuation"], ", . . ."),
        ("[CLS] not , good . . . [SEP]", ["not", "good"], "not good"),
        # Contractions, in the cuts of WordPiece, byte-level BPE and the treebank.
        ("[CLS] i don ' t like it [SEP]", ["negations"], "don ' t"),
        ("[CLS] i don ’ t like it [SEP]", ["negations"], "don ’ t"),
        ("<s> ▁I ▁don 't ▁like </s>", ["negations"], "▁don 't"),
        ("[CLS] does n ' t like [SEP]", ["negations"], "n ' t"),
        ("[CLS] don t [SEP]", ["negations"], ""),
        ("<s> ▁don ' ▁t </s>", ["don't"], ""),
        ("[CLS] notable not ##able knot [SEP]", ["negations"], ""),
        # Several words.
        ("[CLS] a waste of time , waste oft [SEP]", ["waste of"], "waste of"),
        ("<s> ▁a ▁waste ▁of ▁time </s>", ["waste of time"], "▁waste ▁of ▁time"),
        ("<s> ▁waste of </s>", ["waste of"], ""),
        ("<s> ▁waste ▁of </s>", ["wasteof"], ""),
        ("[CLS] waste of [SEP]", ["wasteof"], ""),
        # Special tokens by their own name, or all of them.
        ("[CLS] sep cls [SEP]", ["[SEP]"], "[SEP]"),
        ("[CLS] sep cls [SEP]", ["[sep]", "CLS"], "cls [SEP]"),
        ("[CLS] sep cls [SEP]", ["special"], "[CLS] [SEP]"),
        ("[CLS] . [SEP]", ["special", "punctuation"], "[CLS] . [SEP]"),
        ("[CLS] [SEP]", ["not"], ""),
        ("[CLS] ## # [SEP]", ["punctuation"], "## #"),
    ],
)
def test_a_text_is_found_where_tokens_spell_it_as_whole_words(tokens: str, wanted: list[str], expected: str) -> None:
    assert found(tokens, *wanted) == expected


def test_each_token_counts_as_a_word_where_words_are_unknown() -> None:
    assert found("a not b not", "not", known=False) == "not not"
    assert found("a no ##body", "##body", known=False) == "##body"
    assert found("[CLS] a", "special", known=False) == ""


@pytest.mark.parametrize("name", SETS)
def test_a_set_stands_for_its_texts(name: str) -> None:
    assert wanted_tokens(name) == [*SETS[name]]
    assert wanted_tokens([name, "film"]) == [*SETS[name], "film"]


@pytest.mark.parametrize("tokens", ["", [], [" "], [3], ["not", None]])
def test_what_is_no_text_is_refused(tokens: Any) -> None:
    with pytest.raises(RecordError, match="tokens must be texts, such as"):
        wanted_tokens(tokens)


@pytest.mark.parametrize("tokens", ["negations", "punctuation", "special", "[SEP]", ["film", "!"], "absent"])
def test_mass_is_the_share_of_the_row_on_those_tokens(tmp_path: Path, tokens: Any) -> None:
    made = write_run(tmp_path, "one")

    table = study.load(tmp_path).mass(tokens)

    by_hand = {
        "negations": {"not", "never"},
        "punctuation": {"!", "."},
        "special": {"[CLS]", "[SEP]"},
        "[SEP]": {"[SEP]"},
        "absent": set(),
    }
    wanted = by_hand[tokens] if isinstance(tokens, str) else {*tokens}
    assert len(table) == 3 * 2 * 2 * len(made.tokens)
    for one in table.to_dict("records"):
        words = made.tokens[one["example"]]
        marks = [
            # Every "no" of these texts but the last token before [SEP] begins "nobody".
            word in wanted or (tokens == "negations" and is_negation(words, place))
            for place, word in enumerate(words)
        ]
        row = made.rows[one["step"], one["method"], one["layer"]][one["example"]]
        share = sum(value for value, mark in zip(row, marks, strict=True) if mark) / sum(row)
        assert one["mass"] == pytest.approx(share, abs=1e-12)
        assert one["tokens"] == sum(marks)


def is_negation(words: list[str], place: int) -> bool:
    """Whether a token is of the word ``nobody``, or ``no`` alone."""
    return words[place] == "no" or (words[place] == "##body" and words[place - 1] == "no")


def test_a_row_without_any_attribution_has_no_share(tmp_path: Path) -> None:
    empty = {(10, "N-Enc", 1): [np.zeros(5)], (20, "N-Enc", 1): [np.full(5, np.nan)]}
    write_run(tmp_path, "one", lengths=(5,), steps=(10, 20, 30), methods=("N-Enc",), layers=1, rows=empty)

    table = study.load(tmp_path).mass("special").set_index("step")["mass"]

    assert math.isnan(table[10])
    assert math.isnan(table[20])
    assert 0 < table[30] < 1
