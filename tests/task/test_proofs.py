"""Deliberate errors, each of which the analysis itself has to notice while it runs."""

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from globenc_lightning import GlobEncCallback, analysis, planning
from globenc_lightning.encoder.checks import Checks
from globenc_lightning.errors import GlobEncError
from globenc_lightning.task import replaying
from globenc_lightning.task.kinds import Decision
from globenc_lightning.task.replaying import Layout, Replay, prove_rows, prove_units
from tests.task.test_zoo import BY_NAME, by_hand, train
from tests.task.zoo import (
    IGNORED,
    PAD,
    Case,
    Distilled,
    HeadInStep,
    Recurrent,
    classes,
    largest,
    text,
    triple,
)


def refused(case: Case, **arguments: Any) -> str:
    """Why an analysis of a case is refused."""
    with pytest.raises(GlobEncError) as caught:
        train(case, GlobEncCallback(**{**case.arguments, "on_error": "raise", **arguments}))
    return str(caught.value)


def made(module: Any, score: Any = largest, batch: Any = triple, **changes: Any) -> Case:
    return replace(BY_NAME["tensor_dataset"], module=module, score=score, batch=batch, dataset=False, **changes)


@pytest.mark.parametrize("name", ["two_tasks_second", "two_tasks_named"])
def test_the_logits_of_another_head(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    own = Replay.decided

    def another(self: Replay, ran: Any, *others: Any) -> Decision:
        return own(self, ran._replace(losses=ran.losses[::-1]), *others)

    monkeypatch.setattr(Replay, "decided", another)
    assert "are not those that cross_entropy in validation_step is called with" in refused(BY_NAME[name])


@pytest.mark.parametrize("name", ["two_tasks_second", "two_tasks_named"])
def test_another_head_from_the_second_validation_on(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    own, count = analysis.compare, []

    def another(self: Replay, ran: Any, *others: Any) -> Decision:
        return decided(self, ran._replace(losses=ran.losses[::-1]) if count else ran, *others)

    def compared(*arguments: Any) -> None:
        own(*arguments)
        if not count:
            monkeypatch.setattr(Replay, "decided", another)
        count.append(1)

    decided = Replay.decided
    monkeypatch.setattr(analysis, "compare", compared)
    assert refused(BY_NAME[name])


@pytest.mark.parametrize("name", ["tensor_dataset", "binary", "multiple_choice", "in_batch_negatives", "tagging"])
def test_another_order_of_rows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    own = replaying.find_layout

    def turned(*arguments: Any) -> Layout:
        layout = own(*arguments)
        return replace(layout, rows=layout.rows.flip(0))

    monkeypatch.setattr(analysis, "find_layout", turned)
    assert "decided from other texts than" in refused(BY_NAME[name])


@pytest.mark.parametrize("name", ["tensor_dataset", "regression_mse", "tagging_active"])
def test_the_order_of_the_examples_changes_after_the_first_validation(name: str) -> None:
    case = BY_NAME[name]
    flipped: list[bool] = []

    class Turns(type(case.module())):  # type: ignore[misc]
        def loss(self, batch: Any) -> Tensor:
            found = [one.flip(0) for one in batch] if self.global_step else batch
            flipped.append(found is not batch)
            return super().loss(found)

    text = refused(replace(case, module=Turns))
    assert any(flipped)
    assert "on other labels, or in another order, than when its decision was found" in text


@pytest.mark.parametrize("name", ["masked_lm", "causal_lm", "causal_lm_by_hand", "t5", "tagging", "tagging_by_class"])
@pytest.mark.parametrize("shift", [-1, 1])
def test_a_shifted_position(name: str, shift: int, monkeypatch: pytest.MonkeyPatch) -> None:
    own = replaying.chosen_unit

    def shifted(decision: Decision, units: Any, counts: Counter[int]) -> int | None:
        found = own(decision, units, counts)
        return found if found is None else max(0, found + shift)

    monkeypatch.setattr(replaying, "chosen_unit", shifted)
    told = refused(BY_NAME[name])
    assert "is not the one that the labels of validation_step tell" in told or "decided from the same text" in told


class Follows(Distilled):
    """The student's hidden states are to be the teacher's, and the teacher runs first, with gradients."""

    def loss(self, batch: Any) -> Tensor:
        ids, mask, y = batch
        told = self.teacher.bert(ids, attention_mask=mask).last_hidden_state[:, 0]
        own = self.student.bert(ids, attention_mask=mask).last_hidden_state[:, 0]
        return F.cross_entropy(self.student.classifier(own + 0.1 * told), y)


class TeachersLoss(Distilled):
    """What the teacher gets wrong is computed first, for comparison."""

    def loss(self, batch: Any) -> Tensor:
        ids, mask, y = batch
        told = self.teacher(ids, attention_mask=mask).logits
        self.log("teacher", F.cross_entropy(told, y))
        return F.cross_entropy(self.student(ids, attention_mask=mask).logits, y)


def followed(module: Any, batch: Any) -> Tensor:
    own, told = (
        one.bert(batch[0], attention_mask=batch[1]).last_hidden_state[:, 0] for one in (module.student, module.teacher)
    )
    return module.student.classifier(own + 0.1 * told).amax(-1)


def students(module: Any, batch: Any) -> Tensor:
    return module.student(batch[0], attention_mask=batch[1]).logits.amax(-1)


WITH_TEACHER = {
    "its hidden states": made(Follows, followed, encoder=lambda module: module.student.bert),
    "its loss": made(TeachersLoss, students, encoder=lambda module: module.student.bert),
}


def assert_explained(case: Case) -> GlobEncCallback:
    """The figures of the last validation are those of the score of the case."""
    callback = GlobEncCallback(**case.arguments, on_error="raise")
    module, _ = train(case, callback)
    module.trainer = None
    own = [one for batch in case.validation() for one in by_hand(case, module.eval(), batch).saliency]
    for mine, theirs in zip(callback.history[-1].saliency, own, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5 * float(theirs.max()))
    return callback


@pytest.mark.parametrize("name", list(WITH_TEACHER))
def test_the_student_is_explained(name: str) -> None:
    assert_explained(WITH_TEACHER[name])


def test_the_teacher_instead_of_the_student(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = replaying._depends_on
    monkeypatch.setattr(replaying._Search, "_calls", lambda self, tensor: calls(tensor, self._outputs))
    assert "is frozen, and another one that the decision depends on is trained" in refused(
        WITH_TEACHER["its hidden states"]
    )
    assert "depend on nothing that is trained" in refused(WITH_TEACHER["its loss"])


def padded(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    ids, mask = (F.pad(one, (0, 4), value=PAD) for one in text(seed))
    return ids, mask, classes(seed)


class Padded(HeadInStep):
    """The mean over all columns, padding included, by a head that begins at zero."""

    def __init__(self) -> None:
        super().__init__()
        torch.nn.init.zeros_(self.head.weight)

    def logits(self, ids: Tensor, mask: Tensor) -> Tensor:
        hidden = self.encoder(ids, attention_mask=mask).last_hidden_state
        found: Tensor = self.head(hidden.mean(1))
        return found


class GrowsIntoPadding(HeadInStep):
    """At first the padding has no part in the logits; it has once one weight has moved away from zero."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = torch.nn.Parameter(torch.zeros(()))

    def logits(self, ids: Tensor, mask: Tensor) -> Tensor:
        hidden = self.encoder(ids, attention_mask=mask).last_hidden_state
        found: Tensor = self.head(hidden[:, 0] + 100 * self.gate * hidden.sum(1))
        return found


@pytest.mark.parametrize("module", [Recurrent, Padded, GrowsIntoPadding])
def test_heads_that_see_the_padding_keep_it(module: Any) -> None:
    case = made(module, batch=padded)
    callback = GlobEncCallback(on_error="raise")
    trained, _ = train(case, callback, num_sanity_val_steps=0 if module is Padded else 2)
    trained.trainer = None
    own = [one for batch in case.validation() for one in by_hand(case, trained.eval(), batch).saliency]
    for mine, theirs in zip(callback.history[-1].saliency, own, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5 * float(theirs.max()))


def test_columns_are_cut_off_that_change_the_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "same", lambda *_: True)
    assert "does not give the logits that validation_step gives by itself" in refused(made(Recurrent, batch=padded))


@pytest.mark.parametrize("name", ["in_batch_negatives", "in_batch_one_call"])
def test_rows_are_left_out_that_change_the_logits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "same", lambda *_: True)
    assert "does not give the logits that validation_step gives by itself" in refused(BY_NAME[name], num_examples=3)


class SimCSE(HeadInStep):
    """Unsupervised SimCSE: the same text twice, dropout differs; in an evaluation nothing does."""

    def loss(self, batch: Any) -> Tensor:
        ids, mask, _ = batch
        one, other = (self.encoder(ids, attention_mask=mask).last_hidden_state[:, 0] for _ in range(2))
        scores = F.cosine_similarity(one.unsqueeze(1), other.unsqueeze(0), dim=-1) / 0.05
        return F.cross_entropy(scores, torch.arange(len(ids)))


def test_a_score_that_is_the_same_whatever_the_text_is() -> None:
    assert "the similarity of a text with itself" in refused(made(SimCSE))


def prove(scores: Tensor, rows: list[int], last: Tensor, plain: Tensor) -> None:
    checks = Checks()
    prove_rows(scores, torch.tensor(rows), last)(plain, checks)
    checks.settle()


def test_rows_are_proven_by_what_each_score_reads() -> None:
    last = torch.randn(4, 3, 2, requires_grad=True)
    scores = (last**2).sum((1, 2))[[2, 0, 3]]
    plain = torch.autograd.grad(scores.sum(), last, retain_graph=True)[0]
    prove(scores, [2, 0, 3], last, plain)
    for wrong in ([0, 2, 3], [2, 3, 0], [2, 0, 1]):
        if wrong == [2, 0, 1]:
            continue
        with pytest.raises(GlobEncError, match="from other texts"):
            prove(scores, wrong, last, plain)


def test_a_row_that_two_scores_read_is_no_ones() -> None:
    last = torch.randn(3, 3, 2, requires_grad=True)
    scores = (last**2).sum((1, 2)) + (last[0] ** 2).sum()
    plain = torch.autograd.grad(scores.sum(), last, retain_graph=True)[0]
    with pytest.raises(GlobEncError, match="several from one"):
        prove(scores, [0, 1, 2], last, plain)


def test_units_without_a_label_that_counts() -> None:
    labels = torch.tensor([IGNORED, 1, IGNORED, 2])
    decision = Decision("masked token", torch.randn(4, 5), labels, width=2)
    prove_units(decision, Layout(torch.tensor([1, 3]), torch.arange(2)), Counter(), "a step")
    with pytest.raises(GlobEncError, match="not the one that the labels"):
        prove_units(decision, Layout(torch.tensor([0, 3]), torch.arange(2)), Counter(), "a step")
