"""The console command ``globenc``: ``globenc replay`` records saved checkpoints, ``globenc show`` prints a record."""

import argparse
import csv
import json
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from globenc_lightning.choices import Choices
from globenc_lightning.errors import GlobEncError, GlobEncWarning, RecordError
from globenc_lightning.functional import METHODS
from globenc_lightning.probe import ProbeSet
from globenc_lightning.record import checkpoints, schema
from globenc_lightning.record.checkpoints import Saved
from globenc_lightning.record.replay import Replay, event_files
from globenc_lightning.record.writing import RecordOptions
from globenc_lightning.settings import AGGREGATIONS, FURTHER_METHODS, REFERENCES, Settings
from globenc_lightning.tokenizers import as_tokenizer

LOADER = "loader"
NUM_EXAMPLES = 16
FAILED = 2
GIVEN = ("methods", "target", "readout", "aggregation", "references", "signed")
"""What the command line may choose in place of what the callback in a checkpoint has chosen."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: the command line; that of the process when None.

    Returns:
        0, or 2 where something could not be done: what and why stands on the error output, and nothing is lost.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _print_warning
            options.run_command(options)
    except (GlobEncError, ValueError, OSError) as error:
        print(f"globenc {options.command}: {error}", file=sys.stderr)  # noqa: T201
        return FAILED
    except KeyboardInterrupt:
        print(f"globenc {options.command}: stopped; what was recorded stays.", file=sys.stderr)  # noqa: T201
        return 130
    return 0


def replay(options: argparse.Namespace) -> None:
    """Record saved checkpoints, in the order of their steps.

    Args:
        options: the command line.

    Raises:
        GlobEncError: a checkpoint cannot be loaded or analysed; those before it are recorded.
    """
    paths = checkpoints.matching(options.checkpoints)
    saved = checkpoints.order_folders(paths, options.model) if options.model else checkpoints.order_lightning(paths)
    if options.run:
        if len({one.run for one in saved}) > 1:
            told = ", ".join(sorted({one.run for one in saved}))
            raise RecordError(f"--run names one run, and the checkpoints are of several: {told}. Leave it out.")
        saved = [one._replace(run=schema.run_name(options.run)) for one in saved]
    kind = None if options.model else checkpoints.module_class(options.module)
    with _Progress(len(saved)) as advance:
        for run in dict.fromkeys(one.run for one in saved):
            _replay_run([one for one in saved if one.run == run], kind, options, advance)


def _replay_run(saved: Sequence[Saved], kind: Any, options: argparse.Namespace, advance: Any) -> None:
    """Record the checkpoints of one run."""
    made: Replay | None = None
    to, probe = None, None
    for one in saved:
        folder = Path(options.record)
        if not options.again and one.step in _recorded(folder, one.run):
            advance(f"{one.run}, step {one.step}: recorded already")
            continue
        checkpoint = {} if options.model else checkpoints.load_lightning(one.path)
        model = checkpoints.build_folder(one.path) if options.model else _built(kind, one.path, options)
        if made is None:
            made = _replay_of(one, model, checkpoint, options)
            made.go_on()
            to = event_files(folder / "events" / one.run, time.time()) if options.events else None
        told = _probe_told(checkpoint)
        if options.probe is None and None not in (probe, told) and probe != told:
            raise RecordError(
                f"{one.path} was saved with another probe ({told}) than those before it ({probe}): replay each "
                "training with its own --run NAME, or give one --probe for all."
            )
        probe = probe or told
        entry = made.measure(model, one.step, one.epoch, to)
        rho = ", ".join(f"{method} {float(values[-1]):.3f}" for method, values in [*entry.correlation.items()][-1:])
        advance(f"{one.run}, step {one.step}: rho {rho}")


def _probe_told(checkpoint: Mapping[str, Any]) -> str | None:
    """The fingerprint of the probe that a checkpoint's callback had."""
    state = checkpoints.callback_state(checkpoint) or {}
    return (state.get("about") or {}).get("probe")


def _recorded(folder: Path, run: str) -> list[int]:
    from globenc_lightning.record.writing import RunRecord

    return RunRecord(folder, run).steps()


def _built(kind: Any, path: Path, options: argparse.Namespace) -> nn.Module:
    return checkpoints.build(kind, path, _arguments(options.arguments))


def _replay_of(one: Saved, model: nn.Module, checkpoint: Mapping[str, Any], options: argparse.Namespace) -> Replay:
    """What measures a run's checkpoints: with the settings and the probe of its own callback, or with those given."""
    state = checkpoints.callback_state(checkpoint)
    given = {name: value for name in GIVEN if (value := getattr(options, name)) is not None}
    if state is None:
        number = options.num_examples or NUM_EXAMPLES
        choices = Choices(Settings(**given), number, faithfulness=_masked(options) or False)
    else:
        masked = {} if options.faithfulness is None else {"faithfulness": _masked(options)}
        choices = checkpoints.choices_of(state, options.num_examples, **given, **masked)
    tokenizer = options.tokenizer or (str(one.path) if options.model else None)
    tokenizer = _tokenizer(tokenizer, required=options.tokenizer is not None)
    extra = {"seed": None, "hyperparameters": _plain(checkpoint.get("hyper_parameters") or {}), "replayed": True}
    made = Replay(
        options.record,
        one.run,
        _probe(options, model, tokenizer),
        tokenizer=tokenizer,
        choices=choices,
        options=RecordOptions(dtype=options.dtype),
        extra=extra,
    )
    if options.probe is None:
        if state is None or state.get("probe") is None:
            where = "the folder" if options.model else "the checkpoint"
            raise RecordError(
                f"{where} {one.path} holds no probe of a GlobEncCallback: give --probe FILE (TSV or JSONL with a "
                f"column of texts), or --probe {LOADER} for the module's validation loader."
            )
        made.restore(state)
    return made


def _masked(options: argparse.Namespace) -> bool | list[str]:
    """The methods whose first tokens are masked: those that are named, or all where the option names none."""
    named: list[str] | None = options.faithfulness
    return named is not None and (named or True)


def _tokenizer(name: str | None, required: bool) -> Any | None:
    if name is None:
        return None
    try:
        return as_tokenizer(name)
    except ValueError:
        if required:
            raise
        # A folder of a model need not hold one.
        return None


def _probe(options: argparse.Namespace, model: nn.Module, tokenizer: Any | None) -> Any:
    """The probe that the command line names."""
    if options.probe is None:
        return None
    if options.probe == LOADER:
        return _loader(model, options)
    texts, labels = _texts_in(Path(options.probe), options.text_column, options.label_column)
    texts, labels = texts[: options.num_examples], labels[: options.num_examples]
    holder = tokenizer if tokenizer is not None else getattr(model, "tokenizer", None)
    if holder is None:
        raise RecordError("texts need a tokenizer, and the model holds none as .tokenizer: give --tokenizer FOLDER.")
    known = [one for one in labels if one is not None]
    return ProbeSet.from_texts(texts, holder, known if len(known) == len(texts) else None)


def _loader(model: nn.Module, options: argparse.Namespace) -> Any:
    """The validation loader of the module or its datamodule."""
    source: Any = model
    if options.datamodule:
        source = checkpoints.module_class(options.datamodule)(**_arguments(options.datamodule_arguments))
        source.prepare_data()
        source.setup("validate")
    make = getattr(source, "val_dataloader", None)
    try:
        loader = None if make is None else make()
    except Exception as error:
        raise RecordError(f"{type(source).__name__}.val_dataloader() raised {type(error).__name__}: {error}") from error
    if isinstance(loader, list | tuple):
        loader = loader[0] if loader else None
    if loader is None or not hasattr(loader, "dataset"):
        raise RecordError(
            f"{type(source).__name__} has no val_dataloader() that gives a DataLoader: give --datamodule "
            "package.module:Class, or --probe FILE."
        )
    return loader


def _texts_in(path: Path, text_column: str, label_column: str) -> tuple[list[str], list[int | None]]:
    """The texts and class indices in a file.

    Raises:
        RecordError: there is no such file or column, or a line that cannot be read.
    """
    rows: list[Mapping[str, Any]] = []
    try:
        with path.open(encoding="utf-8", newline="") as file:
            if path.suffix in (".jsonl", ".json"):
                rows = [json.loads(line) for line in file if line.strip()]
            else:
                rows = [*csv.DictReader(file, delimiter="," if path.suffix == ".csv" else "\t")]
    except FileNotFoundError as error:
        raise RecordError(f"there is no file {path}.") from error
    except (OSError, ValueError, csv.Error) as error:
        raise RecordError(f"{path} cannot be read: {error}") from error
    if not rows:
        raise RecordError(f"{path} holds no row.")
    if not all(isinstance(row, Mapping) and isinstance(row.get(text_column), str) for row in rows):
        there = ", ".join(map(str, rows[0])) if isinstance(rows[0], Mapping) else "no columns"
        raise RecordError(f"{path} has no column {text_column!r} of texts; it has {there}: choose --text-column.")
    texts = [row[text_column] for row in rows]
    labels = [str(row.get(label_column)).strip() for row in rows]
    return texts, [int(one) if one.lstrip("-").isdigit() else None for one in labels]


def _arguments(text: str | None) -> dict[str, Any]:
    try:
        told = json.loads(text or "{}")
    except ValueError as error:
        raise RecordError(f"arguments must be a mapping in JSON, such as '{{\"classes\": 3}}': {error}") from error
    if not isinstance(told, dict):
        raise RecordError(f"arguments must be a mapping in JSON, such as '{{\"classes\": 3}}'; got {text!r}.")
    return told


def _counted(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a number from 1; got {text!r}")
    return int(text)


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    text = json.dumps({str(name): value for name, value in values.items()}, default=lambda one: type(one).__name__)
    return dict(json.loads(text))


def show(options: argparse.Namespace) -> None:
    """Print what records hold, and save figures of them.

    Args:
        options: the command line.

    Raises:
        GlobEncError: there is no record, or runs that cannot be compared.
    """
    from globenc_lightning.record.show import print_study, save_figures
    from globenc_lightning.study import load

    study = load(options.records, runs=options.runs, probe=options.probe)
    print_study(study, options.methods, options.threshold)
    if options.save:
        for path in save_figures(study, Path(options.save), options.format):
            print(path)  # noqa: T201


class _Progress:
    """A bar on the error output, one step per checkpoint."""

    def __init__(self, total: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}", markup=False), BarColumn())
        console = Console(stderr=True)
        self._bar = Progress(*columns, MofNCompleteColumn(), TimeRemainingColumn(), console=console)
        self._task = self._bar.add_task("checkpoints", total=total)

    def __enter__(self) -> Any:
        self._bar.__enter__()
        return self._advance

    def _advance(self, text: str) -> None:
        self._bar.update(self._task, advance=1, description=text)

    def __exit__(self, *raised: Any) -> None:
        self._bar.__exit__(*raised)


def _print_warning(message: Any, category: Any, *_: Any, **__: Any) -> None:
    """Print what this package warns of; what libraries warn of as they are imported is none of the user's."""
    if isinstance(category, type) and issubclass(category, GlobEncWarning):
        print(f"globenc: {message}", file=sys.stderr)  # noqa: T201


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("globenc", description="Records of what an encoder attends to.")
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("replay", help="record saved checkpoints", description=_REPLAY)
    model = one.add_mutually_exclusive_group(required=True)
    model.add_argument("--module", metavar="PACKAGE.MODULE:CLASS", help="the LightningModule of .ckpt files")
    model.add_argument("--model", metavar="TYPE", help="Hugging Face folders: their model type, such as bert, or auto")
    one.add_argument("checkpoints", nargs="+", help="files or folders, or patterns such as 'runs/**/*.ckpt'")
    one.add_argument("--record", default="record", metavar="FOLDER", help="where to; default: record")
    one.add_argument("--run", help="the run's name; default: made of the checkpoints' folder")
    one.add_argument("--probe", metavar="FILE", help=f"a TSV, CSV or JSONL file of texts, or {LOADER!r}; default: the "
                     "probe of the GlobEncCallback in the checkpoint")  # fmt: skip
    one.add_argument("--text-column", default="text", metavar="NAME")
    one.add_argument("--label-column", default="label", metavar="NAME")
    one.add_argument("--num-examples", type=_counted, metavar="N", help="default: all of a file; of a loader as many "
                     f"as the callback took, or {NUM_EXAMPLES}")  # fmt: skip
    one.add_argument("--tokenizer", metavar="FOLDER", help="default: the model's own")
    one.add_argument("--arguments", metavar="JSON", help="of the LightningModule, in place of those in the checkpoint")
    one.add_argument("--datamodule", metavar="PACKAGE.MODULE:CLASS", help="whose val_dataloader is the probe's loader")
    one.add_argument("--datamodule-arguments", metavar="JSON")
    one.add_argument("--methods", nargs="+", choices=(*METHODS, *FURTHER_METHODS), metavar="METHOD")
    one.add_argument("--target", choices=("predicted", "label"))
    one.add_argument("--readout", choices=("auto", "cls", "last", "mean"))
    one.add_argument("--aggregation", choices=AGGREGATIONS, help="how the layers' maps are put together")
    one.add_argument("--references", nargs="+", choices=REFERENCES, metavar="NAME", help="what the methods are "
                     f"compared with: {', '.join(map(repr, REFERENCES))}")  # fmt: skip
    one.add_argument("--signed", action="store_true", default=None, help="signed contributions to the score, too")
    one.add_argument("--faithfulness", nargs="*", choices=(*METHODS, *FURTHER_METHODS), metavar="METHOD",
                     help="how much the decisions depend on the tokens that these methods rank first; all if none is "
                     "named")  # fmt: skip
    one.add_argument("--dtype", default="float32", choices=("float32", "float16"))
    one.add_argument("--again", action="store_true", help="analyse steps that are recorded already, too")
    one.add_argument("--events", action="store_true", help="write event files for TensorBoard's GlobEnc tab, too")
    one.set_defaults(run_command=replay)
    two = commands.add_parser("show", help="print a record", description="Print tables of one run or of many.")
    two.add_argument("records", nargs="+", help="folders of records, or folders and patterns that hold such")
    two.add_argument("--runs", nargs="+", metavar="NAME")
    two.add_argument("--probe", help="the fingerprint of the probe whose runs are taken")
    two.add_argument("--methods", nargs="+", choices=(*METHODS, *FURTHER_METHODS), metavar="METHOD")
    two.add_argument("--threshold", type=float, default=0.1, help="of drift, for stabilization; default: 0.1")
    two.add_argument("--save", metavar="FOLDER", help="save figures there")
    two.add_argument("--format", choices=("svg", "png"), default="svg")
    two.set_defaults(run_command=show)
    return parser


_REPLAY = """Record the figures of saved checkpoints, in the order of their steps: Lightning's .ckpt files (--module),
or folders that Hugging Face's save_pretrained or Trainer wrote (--model). Steps that are recorded already are left
out."""


if __name__ == "__main__":
    sys.exit(main())
