"""The score of what was decided on the whole text, in a decision on another copy of it.

Axes: ``n`` example, ``c`` class, ``s`` token.
"""

import torch
from torch import Tensor

from globenc_lightning.task.kinds import BY_TOKEN, VALUES, Decision

FIXED_SCORES = {
    "classification": "probability of the class that the whole text is given",
    "binary": "probability of the answer that the whole text is given",
    "multi-label": "probability of the whole text's most probable label",
    "regression": "the value",
    "token classification": "probability of the token's class in the whole text",
    "masked token": "probability of the token that the whole text is filled with",
    "next token": "probability of the token that follows the whole text",
    "span": "probability of the whole text's span: that of its start times that of its end",
    "choice": "probability of the choice that is taken with the whole text",
    "similarity": "similarity of the example with its partner",
    "text to text": "probability of the token that is written for the whole text",
    "loss": "the loss",
}
"""The score that masked copies are compared by, in words."""


def fixed_score(decision: Decision, whole: Decision) -> Tensor:
    """Returns the score (n,), in float64, that a decision gives to what was decided on the whole texts.

    A probability where the kind of decision has one, else the value (``VALUES``).

    Args:
        decision: the decision on copies of the texts; its units are the examples.
        whole: the decision on the texts themselves, of the same units.
    """
    logits, every = decision.logits.double(), torch.arange(len(decision.logits))
    if decision.kind in VALUES:
        return decision.scores(every).double()
    if decision.kind == "binary" or (decision.kind in BY_TOKEN and logits.shape[1] == 1):
        sign = torch.where(whole.predicted(every) > 0, 1.0, -1.0).double()
        return torch.sigmoid(sign * logits[:, 0])
    chosen = whole.predicted(every).unsqueeze(1)
    if decision.kind == "multi-label":
        return torch.sigmoid(logits).gather(1, chosen).squeeze(1)
    found = logits.softmax(1).gather(1, chosen).squeeze(1)
    if decision.kind == "span" and decision.ends is not None and whole.ends is not None:
        end = whole.ends.argmax(1, keepdim=True)
        found = found * decision.ends.double().softmax(1).gather(1, end).squeeze(1)
    return found
