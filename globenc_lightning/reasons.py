"""What a user is told in a training: each warning once, and why there are no figures where there are none."""

import re
from collections.abc import Callable

from lightning_utilities.core.rank_zero import rank_zero_only

from globenc_lightning.encoder.undisturbed import random_states_kept
from globenc_lightning.errors import warn
from globenc_lightning.measurement import History

MAX_REASON = 4000


class Reasons:
    """Warns once about each thing, and keeps the reasons that are still to be written where figures are missing.

    Args:
        on_error: ``"raise"`` lets the errors of :meth:`attempt` stop the training, ``"warn"`` does not.
    """

    def __init__(self, on_error: str) -> None:
        self._raises = on_error == "raise"
        self._said: set[str] = set()
        self._unshown: list[str] = []

    def say(self, message: str, kind: str | None = None) -> None:
        """Warn once: once for each message, or once for a kind of message whose numbers differ."""
        if (kind or message) not in self._said:
            self._said.add(kind or message)
            rank_zero_only(warn)(message)

    def attempt(self, job: Callable[[], None], raises: bool = True) -> str | None:
        """Do something that must not stop a training, unless the user wants it to.

        Args:
            job: what is done; it cannot move the random state.
            raises: False where one process alone does it: the others would wait for it.

        Returns:
            What was said if it failed, else None.
        """
        try:
            with random_states_kept():
                job()
        except Exception as error:
            if raises and self._raises:
                raise
            # A refusal tells its error to the digit, which moves with the weights: the layer is what tells it apart.
            kind = re.sub(r"[0-9.]+e[-+][0-9]+", "", f"{type(error).__name__}: {error}")
            text = f"GlobEncCallback: {type(error).__name__}: {error}\nThe training goes on without these figures."
            self.say(text, kind)
            return text
        return None

    def begin(self) -> None:
        """Another training: what was still to be written belongs to the one before."""
        self._unshown = []

    def note(self, history: History, step: int, reason: str | None) -> None:
        """Keep a reason why there are no figures, once, if it is one; :meth:`to_show` gives it to whoever writes it."""
        if reason is not None and all(text != shortened(reason) for _, text in history.reasons):
            history.reasons.append((step, shortened(reason)))
            self._unshown.append(shortened(reason))

    def to_show(self, history: History) -> str:
        """Returns the reasons that are new, a line each, or an empty text; those of a trial run are taken back."""
        kept = [text for _, text in history.reasons]
        unshown, self._unshown = [text for text in self._unshown if text in kept], []
        return "\n".join(unshown)


def shortened(reason: str) -> str:
    """Returns a reason as it is kept and written: an error may hold a whole tensor."""
    return reason if len(reason) <= MAX_REASON else f"{reason[: MAX_REASON - 1]}…"
