"""Texts in a Trainer's own progress bar: Lightning's two, those made of them, any other, or a line where there is none.

Nothing is added to a bar and nothing stays in it: it shows another description for a while.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lightning_utilities.core.rank_zero import rank_zero_info

from globenc_lightning.progress import Display

if TYPE_CHECKING:
    import pytorch_lightning as pl


class Described:
    """Shows texts in the description of a bar.

    Args:
        get: returns the bar's description.
        put: changes it, at once.
    """

    def __init__(self, get: Callable[[], str], put: Callable[[str], None]) -> None:
        self._put = put
        self._before = get()
        self._latest = self._before
        self._get = get

    def show(self, text: str) -> None:
        """Show a text in place of the description."""
        self._latest = text
        self._put(text)

    def end(self) -> None:
        """Put the description back, if it is still ours."""
        if self._get() == self._latest:
            self._put(self._before)


class Line:
    """Shows one line, and no more, where no bar can show a text.

    Args:
        say: writes a line.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._is_said = False

    def show(self, text: str) -> None:
        """Write the first text."""
        if not self._is_said:
            self._is_said = True
            self._say(f"GlobEncCallback: the analysis takes a while ({text} so far).")

    def end(self) -> None:
        """Do nothing: a line stays."""


class Careful:
    """Shows texts as another display does, until that fails: a strange bar stops no training.

    Args:
        display: what shows them.
    """

    def __init__(self, display: Display) -> None:
        self._display: Display | None = display

    def show(self, text: str) -> None:
        """Show a text."""
        self._try(lambda display: display.show(text))

    def end(self) -> None:
        """Be as before the first text."""
        self._try(lambda display: display.end())

    def _try(self, job: Callable[[Display], None]) -> None:
        try:
            if self._display is not None:
                job(self._display)
        except Exception:
            self._display = None


def display_of(trainer: "pl.Trainer") -> Display:
    """Returns what shows texts in the Trainer's progress bar; writes nothing in a process that is not the first."""
    if not trainer.is_global_zero:
        return Line(lambda line: None)
    bar = getattr(trainer, "progress_bar_callback", None)
    try:
        found = _described(trainer, bar)
    except Exception:
        found = None
    return Careful(Line(lambda line: say(trainer, line)) if found is None else found)


def say(trainer: "pl.Trainer", line: str) -> None:
    """Write a line, beside the Trainer's bar where it has one that can."""
    bar = getattr(trainer, "progress_bar_callback", None)
    try:
        if trainer.is_global_zero and bar is not None and _can_print(trainer, bar):
            bar.print(line)
            return
    except Exception:
        # A bar of somebody's own that cannot.
        pass
    rank_zero_info(line)


def _can_print(trainer: "pl.Trainer", bar: Any) -> bool:
    """Whether a bar writes lines now: Lightning's own swallow them while they show nothing."""
    if not getattr(bar, "is_enabled", True):
        return False
    if _is_tqdm(bar):
        return any(_is_open(one) for one in (bar._train_progress_bar, bar._val_progress_bar))
    return not _is_rich(bar) or bar.progress is not None


def _described(trainer: "pl.Trainer", bar: Any) -> Display | None:
    """The description of the bar that is seen now: a validation's, or else the training's."""
    if bar is None or not getattr(bar, "is_enabled", True):
        return None
    if _is_tqdm(bar):
        bars = [bar._val_progress_bar, bar._train_progress_bar]
        seen = next((one for one in bars if _is_open(one)), None)
        # Its own setter puts ": " behind a description.
        return None if seen is None else Described(lambda: seen.desc, lambda text: _describe(seen, text))
    if _is_rich(bar):
        wanted = [bar.val_progress_bar_id, bar.train_progress_bar_id]
        # A bar that stands before the callback has counted the last batch by now.
        tasks = {task.id: task for task in bar.progress.tasks if task.visible}
        task = next((tasks[one] for one in wanted if one in tasks), None)
        if task is None:
            return None

        def put(text: str) -> None:
            bar.progress.update(task.id, description=text)
            bar.refresh()

        return Described(lambda: task.description, put)
    return None


def _is_tqdm(bar: Any) -> bool:
    return hasattr(bar, "_val_progress_bar") and hasattr(bar, "_train_progress_bar")


def _is_rich(bar: Any) -> bool:
    return hasattr(bar, "progress") and hasattr(bar, "val_progress_bar_id") and hasattr(bar, "train_progress_bar_id")


def _is_open(bar: Any) -> bool:
    return bar is not None and not bar.disable


def _describe(bar: Any, text: str) -> None:
    """Change a tqdm bar's description, which ends in a colon once it is set."""
    bar.desc = text
    bar.refresh()
