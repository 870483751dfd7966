import time
from collections.abc import Callable
from typing import Any

import pytest

from globenc_lightning import METHODS, progress
from globenc_lightning.progress import Cost, Progress


class Shown:
    def __init__(self) -> None:
        self.texts: list[str] = []

    def show(self, text: str) -> None:
        self.texts.append(text)

    def end(self) -> None:
        self.texts.append("(ended)")


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Sets the clock."""
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])

    def set_to(seconds: float) -> None:
        clock[0] = seconds

    return set_to


def run(at: Callable[[float], None], times: list[float], **options: Any) -> tuple[list[str], Progress]:
    shown = Shown()
    told = Progress(lambda: shown, **options)
    for place, seconds in enumerate(times):
        at(seconds)
        told.tell(place * 500, (len(times) - 1) * 500)
    told.end()
    return shown.texts, told


def test_a_short_analysis_is_not_shown(at: Callable[[float], None]) -> None:
    assert run(at, [0, 1, 2.9, 8])[0] == []


def test_a_long_one_is_shown_from_the_third_second_and_not_at_its_end(at: Callable[[float], None]) -> None:
    texts, told = run(at, [0, 2, 4, 6, 8])
    assert texts == ["GlobEnc 1,000/2,000 examples", "GlobEnc 1,500/2,000 examples", "(ended)"]
    assert told.seconds == 8


def test_one_that_is_known_to_be_long_is_shown_at_once(at: Callable[[float], None]) -> None:
    assert run(at, [0, 2, 4], expected=9)[0] == ["GlobEnc 0/1,000 examples", "GlobEnc 500/1,000 examples", "(ended)"]


def test_it_is_not_shown_more_often_than_anybody_can_read(at: Callable[[float], None]) -> None:
    texts, _ = run(at, [0, 3, 3.05, 3.1, 3.25, 9])
    assert texts == ["GlobEnc 500/2,500 examples", "GlobEnc 2,000/2,500 examples", "(ended)"]


def test_an_analysis_that_begins_anew_in_smaller_batches_counts_from_there(at: Callable[[float], None]) -> None:
    told = Progress(Shown)
    for seconds, done in ((0, 0), (5, 8), (6, 0), (9, 8), (10, 16)):
        at(seconds)
        told.tell(done, 16)
    assert told.seconds == 4


def cost(at: Callable[[float], None], validation: float, share: float = 1.0) -> Cost:
    made = Cost()
    at(100)
    made.begin_validation()
    at(100 + validation)
    made.end_validation(share)
    made.analysis = 30
    return made


def test_what_a_validation_costs_is_said_once_with_what_makes_it_cheaper(at: Callable[[float], None]) -> None:
    made = cost(at, 10)
    text = made.words(1000, METHODS, 1)
    assert text is not None
    assert "1,000 examples takes about 30 s at each validation, 75 % of a validation's time" in text
    for name in ("num_examples=250", "methods=['N-Enc']", "every_n_validations=5"):
        assert name in text
    assert made.words(1000, METHODS, 1) is None


def test_nothing_is_advised_that_cannot_be_less(at: Callable[[float], None]) -> None:
    text = cost(at, 10).words(4, ["W"], 1)
    assert text is not None
    assert text.endswith("It takes less with fewer validations (every_n_validations=5).")


@pytest.mark.parametrize(("share", "expected"), [(0.25, "43 %"), (0.0, None)])
def test_a_sanity_check_tells_what_a_whole_validation_takes(
    share: float, expected: str | None, at: Callable[[float], None]
) -> None:
    text = cost(at, 10, share).words(1000, METHODS, 2)
    assert text is not None
    assert (expected is None) == ("%" not in text)
    assert expected is None or f"at 1 of 2 validations, {expected}" in text


def test_what_is_short_costs_no_line(at: Callable[[float], None]) -> None:
    made = cost(at, 10)
    made.analysis = progress.SLOW - 0.1
    assert made.words(16, METHODS, 1) is None


def test_the_advice_is_of_what_was_chosen(at: Callable[[float], None]) -> None:
    text = cost(at, 10).words(40, ["W", "W-Res"], 1, is_given=True)
    assert text is not None
    assert "num_examples" not in text
    assert "fewer examples (10 in probe=)" in text
    assert "fewer methods than 2 (methods=['W'])" in text


def test_a_share_says_whose_it_is(at: Callable[[float], None]) -> None:
    shown = Shown()
    told = Progress(lambda: shown, whose=" of the first process")
    for seconds, done in ((0, 0), (5, 4)):
        at(seconds)
        told.tell(done, 8)
    assert shown.texts == ["GlobEnc 4/8 examples of the first process"]
