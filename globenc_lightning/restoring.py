"""Finds the state of a callback in a checkpoint whose key is another: of an earlier version, or of edited code."""

from collections.abc import Callable, Sequence
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_info

from globenc_lightning import state_keys
from globenc_lightning.choices import Choices, differences
from globenc_lightning.reasons import Reasons
from globenc_lightning.settings import AUTO

FUNCTIONS = ("target", "forward")


def find_state(
    states: dict[Any, Any],
    name: str,
    key: str,
    choices: Choices,
    probe: str,
    taken: Sequence[str],
    old_key: Callable[..., str],
    reasons: Reasons,
) -> None:
    """Give the state that a callback goes on with its key, if it has another one in this checkpoint.

    Args:
        states: the checkpoint's states by their keys; the one that is found is moved to ``key``.
        name: the qualified name of the callback's class.
        key: the callback's key.
        choices: what the callback computes.
        probe: what tells its probe from others before a training.
        taken: keys that belong to other callbacks.
        old_key: makes the key of earlier versions of settings by name.
        reasons: where warnings go.
    """
    if key in states:
        return
    made_of = choices.made_of(probe)
    settings = [choices.named(probe)]
    if choices.settings.readout == AUTO:
        # The default of earlier versions, which is what the new one finds where a head reads the first token.
        settings.append({**choices.named(probe), "readout": "cls"})
    for one in settings:
        older = old_key(**one)
        known = state_keys.older_state(states, name, {**made_of, **one}, taken, older)
        if known is not None:
            edited = [
                function for function in FUNCTIONS if known != older and _is_edited(states[known], function, choices)
            ]
            if known == older:
                rank_zero_info("GlobEncCallback: its state, which an earlier version wrote, is restored.")
            states[key] = states.pop(known)
            if edited:
                reasons.say(
                    f"GlobEncCallback: {' and '.join(edited)} is not the code that the checkpoint was written with (it "
                    "was edited, or this is another version of Python). The history goes on: its earlier figures are "
                    "those of the earlier code. Make a new callback and a new log folder to begin anew."
                )
            return
    found = [*state_keys.made_before(states, name, taken).values()]
    if found:
        now = state_keys.settings_of(made_of)
        was = min((state_keys.settings_of(one) for one in found), key=lambda one: len(differences(one, now)))
        reasons.say(
            "GlobEncCallback: the checkpoint holds the history of a callback with other settings, so this one "
            f"begins a new history: {'; '.join(differences(was, now))}. Write the earlier settings to go on with it."
        )


def _is_edited(state: dict[str, Any], function: str, choices: Choices) -> bool:
    return bool(state["made_of"].get(f"{function}_code") != choices.code[f"{function}_code"])
