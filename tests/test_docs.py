"""What README and the pages of ``docs`` show as code is run, and what they link to is there."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
from pytorch_lightning.loggers import TensorBoardLogger

from globenc_lightning import GlobEncCallback, attribute
from globenc_lightning.record.writing import RecordOptions
from tests.training import Sentences, Steps, build_trainer, classifier, loader, tokenizer

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SNIPPET = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")


def snippets() -> Iterator[Any]:
    for page in PAGES:
        for number, code in enumerate(SNIPPET.findall(page.read_text(encoding="utf-8"))):
            yield pytest.param(code, id=f"{page.stem}-{number}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two recorded runs of one probe are, and what is written lands."""
    return tmp_path_factory.mktemp("docs")


@pytest.fixture(scope="module")
def names(folder: Path) -> dict[str, Any]:
    """What a reader of the pages has at hand: a trained callback, a model, a batch."""
    data = Sentences(12)
    for seed in (0, 1):
        record = RecordOptions(folder / "records", run=f"seed-{seed}")
        callback = GlobEncCallback(num_examples=6, record=record, tokenizer=tokenizer())
        logger = TensorBoardLogger(folder, name="runs", version=str(seed))
        pl.seed_everything(seed, verbose=False)
        module = Steps()
        trainer = build_trainer([callback], logger=logger, max_epochs=2)
        trainer.fit(module, loader(data, 4), loader(data, 4))
    model = classifier().eval()
    return {
        "Trainer": build_trainer,
        "GlobEncCallback": GlobEncCallback,
        "attribute": attribute,
        "callback": callback,
        "trainer": trainer,
        "module": module,
        "model": model,
        "tokenizer": tokenizer(),
        "batch": data.first(3),
        "texts": ["a fine film", "a dull one"],
    }


@pytest.mark.parametrize("code", list(snippets()))
def test_code_on_a_page_runs(code: str, names: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    # The step of the page's own run, where this one has another.
    code = code.replace("step=199", f"step={names['callback'].history[-1].step}")
    exec(compile(code, "page", "exec"), dict(names))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_to_files_lead_to_files(page: Path) -> None:
    links = [link for link in LINK.findall(page.read_text(encoding="utf-8")) if "://" not in link]
    missing = [link for link in links if not (page.parent / link.partition("#")[0]).exists()]
    assert missing == []


def test_every_page_is_in_the_contents() -> None:
    contents = (ROOT / "docs" / "index.md").read_text(encoding="utf-8").splitlines()
    assert sorted(set(contents) & {page.stem for page in PAGES if page.parent.name == "docs"}) == sorted(
        page.stem for page in PAGES if page.parent.name == "docs" and page.stem != "index"
    )
