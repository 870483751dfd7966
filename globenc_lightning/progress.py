"""Shows how far an analysis of more than a few seconds is, and says once what a validation costs."""

import time
from collections.abc import Callable, Sequence
from typing import Protocol

SLOW = 3.0
"""Seconds from which an analysis is shown."""
OFTEN = 0.2
"""Seconds between two signs of it."""


class Display(Protocol):
    """Something that can show a text for a while; :mod:`globenc_lightning.progress_bars` has them."""

    def show(self, text: str) -> None:
        """Show a text in place of the one before."""

    def end(self) -> None:
        """Be as before the first text."""


class Progress:
    """The progress of one analysis, chunk by chunk.

    Args:
        display: finds where it is shown; asked once there is something to show.
        expected: how many seconds the analysis before this one took: a long one is shown from its start.
        whose: of whom the examples are, behind their number; nothing where one process analyses all.

    Attributes:
        seconds: how long the chunks have taken so far.
    """

    def __init__(self, display: Callable[[], Display], expected: float = 0.0, whose: str = "") -> None:
        self.seconds = 0.0
        self._whose = whose
        self._display = display
        self._shown: Display | None = None
        self._expected = expected
        self._begun = self._began = time.monotonic()
        self._last = 0.0

    def tell(self, done: int, total: int) -> None:
        """So many of the examples are analysed; 0 before the first chunk.

        Args:
            done: how many.
            total: of how many.
        """
        now = time.monotonic()
        if not done:
            self._began = now
        self.seconds = now - self._began
        if done >= total or max(now - self._begun, self._expected) < SLOW:
            return
        if self._shown is None:
            self._shown = self._display()
        elif now - self._last < OFTEN:
            return
        self._last = now
        self._shown.show(f"GlobEnc {done:,}/{total:,} examples{self._whose}")

    def end(self) -> None:
        """The analysis has ended, well or not: what was shown is taken back."""
        if self._shown is not None:
            self._shown.end()
            self._shown = None


class Cost:
    """What an analysis takes of a validation.

    Attributes:
        analysis: seconds of the latest analysis.
    """

    def __init__(self) -> None:
        self.analysis = 0.0
        self._validation: float | None = None
        self._began: float | None = None
        self._is_said = False

    def begin_validation(self) -> None:
        """A validation begins."""
        self._began = time.monotonic()

    def end_validation(self, share: float = 1.0) -> None:
        """The validation's own batches are over.

        Args:
            share: how much of a whole validation they were; 0 where nobody knows.
        """
        if self._began is not None and share > 0:
            self._validation = (time.monotonic() - self._began) / share
        self._began = None

    def words(self, examples: int, methods: Sequence[str], every: int, *, is_given: bool = False) -> str | None:
        """Returns one line on the latest analysis, if it is the first long one; else None.

        Args:
            examples: how many are analysed.
            methods: what is computed.
            every: 1 if each validation is analysed, 2 if every second one is, and so on.
            is_given: whether the probe was given, so that nothing else chooses its size.
        """
        if self._is_said or self.analysis < SLOW:
            return None
        self._is_said = True
        share = ""
        if self._validation is not None:
            share = f", {100 * self.analysis / (self.analysis + self._validation):.0f} % of a validation's time"
        whose = "each validation" if every == 1 else f"1 of {every} validations"
        fewer = f"fewer examples ({f'{examples // 4} in probe=' if is_given else f'num_examples={examples // 4}'})"
        one = "N-Enc" if "N-Enc" in methods else methods[0]
        cheaper = [
            *([fewer] if examples >= 8 else []),
            *([f"fewer methods than {len(methods)} (methods=[{one!r}])"] if len(methods) > 1 else []),
            f"fewer validations (every_n_validations={5 * every})",
        ]
        return (
            f"GlobEncCallback: analysing {examples:,} examples takes about {self.analysis:,.0f} s at {whose}{share}. "
            f"It takes less with {' or '.join(cheaper)}."
        )
