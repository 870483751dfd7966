from typing import Any

import pytest

from globenc_lightning.schedule import Schedule


def taken(schedule: Schedule, steps: range) -> list[int]:
    return [step for step in steps if schedule.takes(step)]


@pytest.mark.parametrize("at_steps", [[1, 5, 9], (9, 1, 5), {1, 5, 9}, range(1, 10, 4)])
def test_the_steps_that_were_asked_for_are_taken(at_steps: Any) -> None:
    assert taken(Schedule(1, at_steps), range(12)) == [1, 5, 9]


def test_a_step_that_comes_again_is_taken_once() -> None:
    schedule = Schedule(1, [2])
    assert [schedule.takes(step) for step in [1, 1, 2, 2, 2, 3]] == [False, False, True, False, False, False]


def test_a_step_that_is_passed_by_is_taken_at_once() -> None:
    # Two optimizers count two steps in each batch.
    assert taken(Schedule(1, [1, 5, 6, 9]), range(0, 14, 2)) == [2, 6, 10]
    assert taken(Schedule(1, "log"), range(0, 20, 3)) == [3, 6, 9, 18]


def test_a_training_that_goes_on_takes_no_step_from_before() -> None:
    schedule = Schedule(1, [2, 12])
    schedule.begin(10)
    assert taken(schedule, range(10, 14)) == [12]


def test_another_training_may_take_the_same_step() -> None:
    schedule = Schedule(1, [2])
    assert schedule.takes(2)
    schedule.begin()
    assert schedule.takes(2)


def test_log_takes_the_powers_of_two_before_the_first_validation() -> None:
    schedule = Schedule(1, "log")
    assert taken(schedule, range(20)) == [1, 2, 4, 8, 16]
    schedule.count_validation()
    assert taken(schedule, range(20, 100)) == []


def test_no_steps_are_taken_unless_asked_for() -> None:
    assert not Schedule(1, None).has_steps
    assert not Schedule(1, []).has_steps
    assert Schedule(1, "log").has_steps
    assert Schedule(1, [3]).has_steps


def test_the_first_validation_and_every_third_after_it_is_analysed() -> None:
    schedule, turns, announced = Schedule(3, None), [], []
    for _ in range(7):
        announced.append(schedule.next_is_turn)
        schedule.count_validation()
        turns.append(schedule.is_turn)
    assert turns == announced == [True, False, False, True, False, False, True]


@pytest.mark.parametrize(
    ("at_steps", "came"), [("powers", "'powers'"), (3, "3"), ([0], "0"), ([True], "True"), ([1.5], "1.5"), ([-2], "-2")]
)
def test_what_cannot_be_used_says_what_to_write(at_steps: Any, came: str) -> None:
    with pytest.raises(
        ValueError, match=r"at_steps must be numbers of training steps, from 1, such as .*; got"
    ) as info:
        Schedule(1, at_steps)
    assert came in str(info.value)
