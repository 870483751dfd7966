"""Takes the probe from what is given or from what a validation shows; names its tokens, shares it, and restores it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor, nn

from globenc_lightning import processes
from globenc_lightning.choices import Choices
from globenc_lightning.encoder.reading import find_encoders
from globenc_lightning.encoder.structure import Structure
from globenc_lightning.errors import EmptyProbeError, ProbeError
from globenc_lightning.measurement import Measurement
from globenc_lightning.probe import ProbeSet, fingerprint, loaders_waited_for, main_input
from globenc_lightning.reasons import Reasons
from globenc_lightning.task.batches import copied, leaves, needs_template, size_of
from globenc_lightning.task.replaying import Part, part_of
from globenc_lightning.tokenizers import Shown, as_tokenizer, disagree, find_tokenizer, likeliest, tokenizers_held

Places = Callable[[], list[Any]]
"""Gives the objects in which a tokenizer may be kept: the module, the datamodule, the loaders' parts."""


class Collector:
    """The probe of a training, from the first batch that is shown to the last checkpoint.

    Args:
        probe: the callback's argument: None, texts, a batch, or a :class:`ProbeSet`.
        tokenizer: the callback's argument: a tokenizer, the folder of one, or None.
        choices: the callback's other arguments.
        reasons: where warnings go.

    Attributes:
        probe: the examples, once they are fixed.
        name: what tells the probe from others before a training: its fingerprint, or ``"validation"``.

    Raises:
        ProbeError: a probe that cannot be used, with what to write instead.
    """

    def __init__(self, probe: Any, tokenizer: Any | None, choices: Choices, reasons: Reasons) -> None:
        self.probe: ProbeSet | None = None
        self._given_tokenizer = None if tokenizer is None else as_tokenizer(tokenizer)
        self._choices = choices
        self._reasons = reasons
        self._texts: list[str] | None = None
        self._parts: list[Part] = []
        self._seen_batches = False
        self._template: Any = None
        self._stored: Mapping[str, Any] | None = None
        self._templates: dict[int, Any] = {}
        self._looked_for_tokenizer = False
        self._named_by_encoder = False
        self._shared = False
        self._unshared: str | None = None
        if probe is not None:
            self._take(probe)
        self.name = "validation" if probe is None else self._fingerprint()

    def _take(self, probe: Any) -> None:
        """Look at the probe argument; texts wait for a tokenizer if none was given."""
        if isinstance(probe, ProbeSet):
            self.probe = probe if self._given_tokenizer is None else probe.with_tokens(self._given_tokenizer)
        elif self._choices.forward is not None and _is_own_form(probe):
            size = size_of(probe)
            part = Part(copied(probe), 0, 0, self._choices.num_examples if size is None else size)
            self.probe = ProbeSet.from_parts([part]).with_tokens(self._given_tokenizer)
        elif isinstance(probe, Mapping):
            self.probe = ProbeSet.from_batch(probe, tokenizer=self._given_tokenizer)
        elif isinstance(probe, str) or (isinstance(probe, Sequence) and all(isinstance(one, str) for one in probe)):
            texts = [probe] if isinstance(probe, str) else list(probe)
            if self._given_tokenizer is None and texts:
                self._texts = texts
            else:
                self.probe = ProbeSet.from_texts(texts, self._given_tokenizer)
        else:
            raise ProbeError(
                f"probe must be None, texts, a batch (a mapping of tensors) or a ProbeSet; got {type(probe).__name__}. "
                "Write ProbeSet.from_texts(texts, tokenizer), or {'input_ids': ids, 'attention_mask': mask}."
            )
        if self.probe is not None and not len(self.probe):
            raise ProbeError("the probe is empty: give at least one example.")

    @property
    def is_called_itself(self) -> bool:
        """Whether the probe was given as what the model itself takes, not as batches of its step."""
        return self._texts is not None or (self.probe is not None and not self.probe.parts)

    @property
    def origin(self) -> str:
        """Where the probe came from, in words."""
        if self.name == "validation":
            return f"the first {0 if self.probe is None else len(self.probe)} examples that the validation showed"
        given = self.probe is not None and bool(self.probe.texts)
        return "texts that were given" if given else "a batch or a ProbeSet that was given"

    @property
    def is_wanted(self) -> bool:
        """Whether the next batch of a validation belongs to the probe."""
        return self.probe is None and self._texts is None

    @property
    def waits_for_a_batch(self) -> bool:
        """Whether a checkpoint's probe holds classes of its user's, and no batch has shown them yet."""
        return self._stored is not None

    def begin_validation(self) -> None:
        """Start to collect anew: a sanity check shows the first rows, and the validation shows them again."""
        self._parts, self._seen_batches = [], False

    def keep_template(self, batch: Any) -> None:
        """Remember the form of a batch: what another process shares has the same, and no classes travel."""
        if self._template is None:
            self._template = copied(batch)

    def collect(self, batch: Any, place: int, loader: int, model: nn.Module, places: Places) -> None:
        """Take the rows of a batch that are still wanted, and fix the probe if these were the last.

        Args:
            batch: the batch as the loader gave it; it is copied.
            place: its number in the validation.
            loader: the number of its loader.
            model: the module that is trained.
            places: where a tokenizer may be kept.
        """
        wanted = self._choices.num_examples - sum(part.wanted for part in self._parts)
        self._seen_batches = True
        part = part_of(copied(batch), place, loader, wanted)
        if part.wanted:
            self._parts.append(part)
        if sum(part.wanted for part in self._parts) >= self._choices.num_examples:
            self.fix(model, places)

    @property
    def can_be_fixed(self) -> bool:
        """Whether a whole validation has shown batches, but fewer rows than were asked for."""
        return self.probe is None and self._seen_batches

    @property
    def can_be_named(self) -> bool:
        """Whether a probe was given before there was a tokenizer, and none was looked for yet."""
        given = self._texts is not None or (self.probe is not None and not self.probe.is_named)
        return given and not self._looked_for_tokenizer

    def fix(self, model: nn.Module, places: Places) -> None:
        """Make the probe of what was given or collected, with its tokens' names.

        Raises:
            ProbeError: texts without a tokenizer, or no example with a real token.
        """
        self._looked_for_tokenizer = True
        tokenizer = self._within_reach(model, places)
        if self._texts is not None:
            if tokenizer is None:
                raise ProbeError(
                    "the probe is made of texts and no tokenizer is within reach: write "
                    "GlobEncCallback(probe=texts, tokenizer=tokenizer)."
                )
            self.probe, self._texts = ProbeSet.from_texts(self._texts, tokenizer), None
        elif self.probe is not None:
            self.probe = self.probe.with_tokens(tokenizer)
        elif self._parts:
            self.probe, self._parts = ProbeSet.from_parts(self._parts).with_tokens(tokenizer), []
        else:
            raise EmptyProbeError("the probe is empty: the validation shows no example with a real token.")
        self._template = None
        if tokenizer is None:
            rank_zero_info("GlobEncCallback: no tokenizer is within reach, so token ids are shown; give tokenizer=.")

    def _within_reach(self, model: nn.Module, places: Places, structure: Structure | None = None) -> Any | None:
        """The tokenizer of the text that is shown; where several name it differently, which one was taken is told."""
        if self._given_tokenizer is not None:
            return self._given_tokenizer
        found, shown = tokenizers_held(places()), self._shown(model, structure)
        if len(found) < 2:
            return find_tokenizer((one.tokenizer for one in found), find_encoders(model).values())
        chosen = likeliest(found, shown)
        if shown.path is not None and disagree(found, shown):
            self._reasons.say(
                f"GlobEncCallback: {len(found)} tokenizers are within reach ({', '.join(one.name for one in found)}), "
                f"and they name the tokens differently: {chosen.name} was taken for {shown.path or 'the encoder'}. To "
                "take another, give GlobEncCallback its tokenizer=.",
                kind="tokenizers",
            )
        return chosen.tokenizer

    def _shown(self, model: nn.Module, structure: Structure | None) -> Shown:
        """What is known of the text whose tokens are named: its encoder and its ids."""
        ids = [] if self.probe is None else self.probe.some_ids()
        if structure is not None:
            return Shown(structure.encoder_name, structure.encoder, ids)
        encoders = find_encoders(model)
        if len(encoders) == 1:
            return Shown(*next(iter(encoders.items())), ids)
        return Shown(ids=ids)

    def name_by_encoder(self, model: nn.Module, places: Places, structure: Structure | None) -> bool:
        """Take the tokenizer of the encoder that is shown, once that is known; whether it is another than before."""
        known = structure is not None
        if not known or self.probe is None or self.probe.tokenizer is None or self._named_by_encoder:
            return False
        self._named_by_encoder = True
        tokenizer, before = self._within_reach(model, places, structure), self.probe.tokenizer
        if tokenizer is None or tokenizer is before:
            return False
        self.probe = self.probe.with_tokens(tokenizer)
        return True

    def compare_tokenizers(self, model: nn.Module, places: Places) -> None:
        """Tell if the tokenizer is another than the one that named a checkpoint's probe."""
        if self.probe is None or self.probe.tokens == self.probe.with_tokens(None).tokens:
            return
        tokenizer = self._within_reach(model, places)
        if tokenizer is None:
            return
        # The names of a probe stay what they are.
        self._named_by_encoder = True
        if self.probe.is_named_by(tokenizer):
            # Earlier versions stored the tokenizer's internal spelling.
            self.probe = self.probe.with_tokens(tokenizer)
        else:
            self._reasons.say(
                "GlobEncCallback: the tokenizer is not the one that the probe in the checkpoint was made with. The "
                "probe and its tokens are kept, so that the curves and filmstrips go on."
            )

    def saw(self, measurement: Measurement) -> None:
        """Remember what the encoder was called with, once an analysis of the probe's batches has told it."""
        if self.probe is not None and not self.probe.is_seen and any(ids is not None for ids in measurement.ids):
            labels = [_label(truth, measurement.task) for truth in measurement.truths]
            self.probe = self.probe.seen(measurement.ids, labels)

    def begin_sharing(self) -> None:
        """Another training: its processes have not agreed on a probe yet."""
        self._shared = False

    def is_shared(self, is_first: bool, model: nn.Module, places: Places) -> bool:
        """Share the first process's probe with all processes, once; whether there is one. All of them call this.

        What goes wrong here is told by :meth:`agreed`, where every process waits for what all of them found.
        """
        if not self._shared:
            mine: tuple[dict[str, Any] | None, str] | None = None
            self._unshared = None
            if self.probe is not None and is_first:
                try:
                    mine = (self.probe.state_dict(), "")
                except ProbeError as error:
                    mine = (None, str(error))
            first = processes.from_first(mine)
            if first is not None:
                self._shared = True
                state, trouble = first
                if trouble:
                    self._unshared = trouble
                elif not is_first:
                    self._take_shared(state, model, places)
        return self._shared

    def _take_shared(self, state: Mapping[str, Any], model: nn.Module, places: Places) -> None:
        """Be given the probe of the first process."""
        own = self.probe.parts if self.probe is not None else ()
        template = own[0].batch if own else self._template
        try:
            probe = ProbeSet.from_state_dict(state, template, {part.loader: part.batch for part in own})
            tokenizer = self._within_reach(model, places)
            # The tokens are those of the first process; further texts are named by what is within reach here.
            self.probe, self._texts = replace(probe, tokenizer=tokenizer if probe.is_named else None), None
        except Exception as error:
            self._unshared = f"{type(error).__name__}: {error}"
        self._template = None

    def agreed(self) -> ProbeSet:
        """Returns the probe.

        Raises:
            ProbeError: the processes do not share one.
        """
        if self._unshared is not None or self.probe is None:
            raise ProbeError(f"the processes do not share a probe: {self._unshared}")
        return self.probe

    def state(self) -> Mapping[str, Any] | None:
        """Returns the probe as a checkpoint takes it; one that waits for a batch stays as its checkpoint held it."""
        if self.probe is None or self._stored is not None:
            return self._stored
        try:
            return self.probe.state_dict()
        except ProbeError as error:
            self._reasons.say(
                "GlobEncCallback: the probe does not travel in checkpoints, so a resumed training takes another: "
                f"{error}"
            )
            return None

    def restore(self, state: Mapping[str, Any] | None, num_examples: int) -> None:
        """Go on with a checkpoint's probe.

        Args:
            state: what :meth:`state` gave.
            num_examples: how many examples were asked for then.
        """
        if state is not None and needs_template(state.get("parts")):
            self._stored = state
        elif state is not None:
            stored, now = ProbeSet.from_state_dict(state), self._choices.num_examples
            if self.name == "validation" and num_examples != now:
                self._reasons.say(
                    f"GlobEncCallback: num_examples is {now} now and was {num_examples} when the checkpoint was "
                    f"written. Its {len(stored)} examples are kept, so that the curves go on."
                )
            self.probe, self._texts, self._parts = stored, None, []
            self._looked_for_tokenizer = False

    def restore_like(self, batch: Any, loader: int, model: nn.Module, places: Places) -> None:
        """Put the probe of a checkpoint into the form of the loaders' batches: a checkpoint names no classes.

        Args:
            batch: a batch of a loader.
            loader: the loader's number. The probe waits until each of its loaders has shown one.
            model: the module that is trained.
            places: where a tokenizer may be kept.
        """
        if self._stored is None:
            return
        if loader not in self._templates:
            self._templates[loader] = copied(batch)
        if not loaders_waited_for(self._stored, self._templates):
            stored, self._stored = self._stored, None
            templates, self._templates = self._templates, {}
            self.probe = ProbeSet.from_state_dict(stored, templates=templates)
            self.compare_tokenizers(model, places)

    def go_back(self, state: Mapping[str, Any] | None) -> None:
        """Be what this was when the same session wrote a state: a trial run leaves nothing behind."""
        if state is not None:
            # The same session: the probe is the one that it was, or was fixed since.
            if not needs_template(state.get("parts")):
                self.probe, self._texts = ProbeSet.from_state_dict(state), None
        elif self.name == "validation":
            self.probe, self._shared = None, False
        self._parts = []

    def _fingerprint(self) -> str:
        if self._texts is not None:
            return fingerprint(self._texts)
        return self.probe.fingerprint() if self.probe is not None else ""


def assumed_probe(probe: ProbeSet) -> tuple[ProbeSet | None, str]:
    """Returns the examples as a model itself may take them, and where in a batch they are, as code.

    They are the entries of mappings, by their usual names; of a batch that combines several loaders, the first one's.
    """
    found: ProbeSet | None = None
    within = ""
    for part in probe.parts:
        batch, place = _mapping_within(part.batch)
        try:
            taken = ProbeSet.from_batch(batch, limit=part.wanted)
        except ProbeError:
            continue
        found, within = (taken, place) if found is None else (found.joined(taken), within)
    return None if found is None else found.with_tokens(probe.tokenizer), within


def _mapping_within(batch: Any) -> tuple[Any, str]:
    """The batch itself, or the first loader's part of one that combines several loaders, and its place as code."""
    parts: list[tuple[Any, Any]] = []
    if isinstance(batch, Mapping) and main_input(batch) is None:
        parts = [*batch.items()]
    elif isinstance(batch, list | tuple):
        parts = [*enumerate(batch)]
    for key, part in parts:
        if isinstance(part, Mapping) and main_input(part) is not None:
            return part, f"[{key!r}]"
    return batch, ""


def _is_own_form(probe: Any) -> bool:
    """Whether a batch has a form that its user alone knows, and tells by ``forward=``: a tuple, or own names."""
    if isinstance(probe, Mapping):
        return main_input(probe) is None and size_of(probe) is not None
    return isinstance(probe, list | tuple) and any(isinstance(leaf, Tensor) for _, leaf in leaves(probe))


def _label(truth: tuple[float, ...], task: str) -> Tensor | None:
    """What an example's label says, as a tensor: a class index; else a value, or several of them."""
    if not truth:
        return None
    if len(truth) == 1 and task not in ("regression", "multi-label"):
        return torch.tensor(int(truth[0]))
    return torch.tensor([float(one) for one in truth]) if len(truth) > 1 else torch.tensor(float(truth[0]))
