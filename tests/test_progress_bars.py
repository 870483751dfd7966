import logging
from typing import Any

import pytest
import pytorch_lightning as pl
from pytorch_lightning.callbacks import ProgressBar, RichProgressBar, TQDMProgressBar

from globenc_lightning import GlobEncCallback, progress, progress_bars
from tests.neutrality import equal
from tests.training import Sentences, Steps, build_trainer, final_state, fit, loader, said

DONE = "GlobEnc 4/12 examples"


@pytest.fixture(autouse=True)
def _everything_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "SLOW", 0.0)
    monkeypatch.setattr(progress, "OFTEN", 0.0)


class Tqdm(TQDMProgressBar):
    """Remembers what its validation bars showed."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[list[tuple[str, int]]] = []

    def _watched(self, bar: Any) -> Any:
        refresh = bar.refresh

        def told(*arguments: Any, **options: Any) -> Any:
            self.seen.append([(bar.desc, bar.n)])
            return refresh(*arguments, **options)

        bar.refresh = told
        return bar

    def init_validation_tqdm(self) -> Any:
        return self._watched(super().init_validation_tqdm())


class Rich(RichProgressBar):
    """Remembers the descriptions of its tasks whenever it is drawn."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[list[tuple[str, int]]] = []

    def refresh(self, *hard: bool, **options: bool) -> None:
        if self.progress is not None:
            tasks = [task for task in self.progress.tasks if task.visible]
            self.seen.append([(task.description, int(task.completed)) for task in tasks])
        super().refresh(*hard, **options)  # pytorch-lightning 2.5 knows no hard one


class Own(ProgressBar):
    """A bar that has nothing but lines."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def print(self, *arguments: Any, **options: Any) -> None:
        self.lines.append(" ".join(map(str, arguments)))


class Broken(Own):
    """A bar that fails."""

    def print(self, *arguments: Any, **options: Any) -> None:
        raise OSError("no terminal")


def train(*callbacks: pl.Callback, bar: bool = True, **options: Any) -> dict[str, Any]:
    pl.seed_everything(3, verbose=False)
    trainer = fit(Steps(), *callbacks, val=loader(Sentences(), 4), enable_progress_bar=bar, max_epochs=2, **options)
    return final_state(trainer)


def ours(**settings: Any) -> GlobEncCallback:
    return GlobEncCallback(**{"num_examples": 12, "methods": ["N-Enc"], **settings})


@pytest.mark.parametrize("first", [True, False], ids=["bar first", "ours first"])
@pytest.mark.parametrize("kind", [Tqdm, Rich])
def test_lightning_s_bars_show_it_and_are_as_before(kind: type[Tqdm | Rich], first: bool) -> None:
    bar, alone = kind(), kind()
    observed, undisturbed = train(*((bar, ours()) if first else (ours(), bar))), train(alone)
    texts = [text for drawn in bar.seen for text, _ in drawn]
    assert DONE in texts
    assert "GlobEnc 8/12 examples" in texts

    def others(seen: list[list[tuple[str, int]]]) -> list[list[tuple[str, int]]]:
        """What is drawn, one after the other, when nothing of ours is."""
        kept = [drawn for drawn in seen if not any(text.startswith("GlobEnc ") for text, _ in drawn)]
        return [one for place, one in enumerate(kept) if not place or one != kept[place - 1]]

    assert others(bar.seen) == others(alone.seen)
    assert equal(observed, undisturbed)


def test_a_training_step_is_shown_in_the_training_s_bar(capsys: pytest.CaptureFixture[str]) -> None:
    train(ours(at_steps=[3]), TQDMProgressBar())
    shown = [part for part in capsys.readouterr().out.replace("\n", "\r").split("\r") if DONE in part]
    # The training's bar counts training batches, the validation's its five.
    assert any("/2 [" in part for part in shown)
    assert any("/5 [" in part for part in shown)


def test_a_bar_of_one_s_own_writes_a_line(caplog: pytest.LogCaptureFixture) -> None:
    bar = Own()
    train(ours(), bar)
    assert [line for line in bar.lines if "takes a while" in line]
    (cost,) = (line for line in bar.lines if "every_n_validations" in line)
    assert "num_examples" in cost
    assert not [message for message in caplog.messages if "takes a while" in message]


@pytest.mark.parametrize("kind", ["none", "broken", "disabled"])
def test_without_a_bar_that_can_there_is_a_line(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    # Whether Lightning's logger hands on what it is told depends on what was imported first.
    monkeypatch.setattr(progress_bars, "rank_zero_info", lines.append)
    bar = {"none": [], "broken": [Broken()], "disabled": [TQDMProgressBar(refresh_rate=0)]}[kind]
    with said() as messages:
        train(ours(), *bar, bar=kind != "none")
    assert messages == []
    if kind != "broken":
        assert [line for line in lines if "takes a while" in line]
    (cost,) = (line for line in lines if "every_n_validations" in line)
    assert "12 examples" in cost


def test_a_validation_on_its_own_leaves_the_cost_to_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr(progress_bars, "rank_zero_info", lines.append)
    callback, module = ours(), Steps()
    trainer = build_trainer([callback])
    trainer.validate(module, loader(Sentences(), 4), verbose=False)
    assert not [line for line in lines if "every_n_validations" in line]
    fit(module, callback, val=loader(Sentences(), 4))
    assert len([line for line in lines if "every_n_validations" in line]) == 1


def test_an_analysis_that_fails_leaves_the_bar_as_it_was() -> None:
    bar = Tqdm()

    def forward(module: Any, batch: Any) -> Any:
        forward.calls += 1  # type: ignore[attr-defined]
        if forward.calls > 2:  # type: ignore[attr-defined]
            raise ArithmeticError("not here")
        return module.model(**batch).logits

    forward.calls = 0  # type: ignore[attr-defined]
    with said() as messages:
        train(ours(forward=forward), bar)
    assert "not here" in messages[0]
    assert not bar.seen[-1][0][0].startswith("GlobEnc ")


def test_what_is_quick_shows_nothing(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(progress, "SLOW", 3600.0)
    bar = Tqdm()
    train(ours(), bar)
    assert not [text for drawn in bar.seen for text, _ in drawn if text.startswith("GlobEnc ")]
    assert not [message for message in caplog.messages if "every_n_validations" in message]
