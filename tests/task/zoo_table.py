"""What works with no argument, as the zoo shows it.

``python -m tests.task.zoo_table`` trains every module of the zoo, and writes ``docs/tasks.md``.
"""

import re
import warnings
from pathlib import Path

import torch

from globenc_lightning import GlobEncCallback
from tests.task.torch_zoo import TORCH_CASES
from tests.task.zoo import CASES, TRAINING, VALIDATION, Case
from tests.training import build_trainer

PAGE = Path(__file__).parents[2] / "docs" / "tasks.md"

HEADER = """\
# What is fine-tuned, and what is explained

Written by `python -m tests.task.zoo_table`, which trains one small LightningModule of each kind, with random weights,
and writes down what the callback has found. Nothing here is typed by hand. The tests train the same modules. They
compare the saliency of each with gradient x input of the score, computed through the module's own parts; the row with
the rows of the tokens that the decision reads; and the training with one without the callback, to the last bit.

- **Task, score.** What `callback.history.about` says.
- **Argument.** What `GlobEncCallback(...)` was given; nothing, where the column is empty.

| What is fine-tuned | Batch | Task | Score of an example | Found in | Argument |
|---|---|---|---|---|---|
"""


def row(case: Case) -> str:
    """A line of the table, from a training."""
    callback = GlobEncCallback(**case.arguments)
    loaders = [case.loader(VALIDATION) for _ in range(case.loaders)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        build_trainer([callback]).fit(case.module(), case.loader(TRAINING), loaders if case.loaders > 1 else loaders[0])
    about = callback.history.about
    if about is None:
        return f"| {case.what} | {case.form} | no figures: {callback.history.reasons[-1][1]} | | | |"
    argument = f"`{case.written}`" if case.written else ""
    return f"| {case.what} | {case.form} | {about.task} | {about.score} | {about.call} | {argument} |".replace(
        "|u - v|", "\\|u - v\\|"
    )


def page() -> str:
    """The page, from a training of every module."""
    return HEADER + "\n".join(row(case) for case in (*CASES, *TORCH_CASES)) + "\n"


def told(text: str) -> list[tuple[str, str, str]]:
    """What a page says of each kind: what is fine-tuned, the form of its batches, the task."""
    rows = re.findall(r"^\| (.+?) \| (.+?) \| ([\w -]+?) \|", text.replace("\\|", "/"), flags=re.MULTILINE)
    return [(what, form, task) for what, form, task in rows if what != "What is fine-tuned"]


if __name__ == "__main__":
    torch.set_num_threads(1)
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(), encoding="utf-8")
