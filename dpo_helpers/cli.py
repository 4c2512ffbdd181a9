"""The command line: `python -m dpo_helpers all --profile mini` does headless what the notebooks do."""

from __future__ import annotations

import inspect
import io
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Optional

import typer
from typer.core import TyperCommand

from .errors import CourseError
from .run import processes
from .run.disk import start_over
from .settings import PROFILES, Settings, load_settings, parse_value
from .untrusted import one_line

# Progress bars are for terminals, not for logs, and of several processes the first one draws them. tqdm's own question
# whether it writes to a terminal (disable=None) would hide them in JupyterLab, which is none.
if os.environ.get("LOCAL_RANK", "0") != "0" or not (sys.stderr and sys.stderr.isatty()):
    os.environ["TQDM_DISABLE"] = "1"

# Completion is for the command dpo-helpers: what typer writes for `python -m` is no shell script.
app = typer.Typer(
    rich_markup_mode=None, no_args_is_help=True, pretty_exceptions_enable=False,
    add_completion=not sys.argv[0].endswith("__main__.py"),
)  # fmt: skip


# What --help writes above an option and those after it; the settings are in the order of their dataclass.
GROUPS = {
    "profile": "Model and data", "freeze_layers": "Training", "beta": "DPO", "prompts": "Evaluation", "trunk_gb": "Run",
    "help": "Options",
}  # fmt: skip


class _Grouped(TyperCommand):
    """A command whose help shows its options in groups: typer does so through rich alone, which swallows [...]."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write all options, each under the title of its group."""
        title, groups = "Options", dict[str, list[tuple[str, str]]]()
        for parameter in self.get_params(ctx):
            title = GROUPS.get(str(parameter.name), title)
            if record := parameter.get_help_record(ctx):
                groups.setdefault(title, []).append(record)
        for title, records in groups.items():
            with formatter.section(title):
                formatter.write_dl(records)


def _option(name: str, kind: str, meaning: str) -> inspect.Parameter:
    python: Any = bool if kind.startswith("bool") else str
    if name == "profile":
        return inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=os.environ.get("DPO_PROFILE", "mini"),
            annotation=Annotated[str, typer.Option(help=meaning)],
        )  # fmt: skip
    defaults = "; ".join(f"{p}: {_show(getattr(s, name))}" for p, s in PROFILES.items())
    option = typer.Option(
        help=f"{meaning} [{defaults}]", show_default=False, metavar=kind.split("[")[0].split(" ")[0].upper()
    )
    annotation = Annotated[Optional[python], option]  # noqa: UP045  # typer reads this form on Python 3.10 too
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _show(value: object) -> str:
    if isinstance(value, tuple):
        return ",".join(f"{v:g}" for v in value)
    return "-" if value in (None, "") else f"{value:g}" if isinstance(value, float) else str(value)


FRESH = inspect.Parameter(
    "fresh", inspect.Parameter.KEYWORD_ONLY, default=False,
    annotation=Annotated[bool, typer.Option("--fresh", help="start over: the earlier run is moved aside, not deleted")],
)  # fmt: skip


@contextmanager
def _plain_errors() -> Iterator[None]:
    """An error becomes one line on standard error and status 2; Ctrl-C and SIGTERM one line and 128 + signal."""
    try:
        yield
    except CourseError as error:
        typer.echo("error: " + " ".join(str(error).split()), err=True)
        raise typer.Exit(2) from None
    except KeyboardInterrupt as stop:
        typer.echo("\n" + (str(stop) or "interrupted: finished stages are kept; run the same again to go on"), err=True)
        raise typer.Exit(128 + getattr(stop, "signal", signal.SIGINT)) from None
    except Exception as error:  # of the machine, or a fault of ours, which its place helps to find
        package = str(Path(__file__).parent)
        frame = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.startswith(package)][-1]
        place = f"{Path(frame.filename).name}, line {frame.lineno}"
        what = " ".join(f"{type(error).__name__}: {error}".split())
        advice = "free disk or memory if one is full; else it is a fault of the course, to be reported with this line"
        typer.echo(one_line(f"error: {what} ({place}); {advice}"), err=True)
        raise typer.Exit(2) from None


def command(run: Callable[..., None]) -> Callable[..., None]:
    """Register a command that takes every setting as an option; `run` gets the Settings and its own options."""
    parameters = inspect.signature(run, eval_str=True).parameters.values()
    own = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters if p.name != "settings"]
    options = [FRESH, *(_option(f.name, str(f.type), f.metadata["help"]) for f in fields(Settings))]

    def _command(**given: Any) -> None:
        own_values = {p.name: given.pop(p.name) for p in own}
        fresh = given.pop("fresh")
        with _plain_errors():
            overrides = {
                name: parse_value(name, value) if isinstance(value, str) else value
                for name, value in given.items()
                if value is not None and name != "profile"
            }
            # the command line beats DPO_PROFILE, which is this option's default
            os.environ["DPO_PROFILE"] = given["profile"]
            settings = load_settings(given["profile"], **overrides)
            if fresh and processes.is_main():
                start_over(settings.run_dir)
            run(settings, **own_values)

    _command.__signature__ = inspect.Signature([*own, *options])  # type: ignore[attr-defined]
    app.command(run.__name__.rstrip("_").replace("_", "-"), cls=_Grouped, help=inspect.getdoc(run))(_command)
    return run


def _show_versions(asked: bool) -> None:
    if not asked:
        return
    from importlib.metadata import version

    from .tools.versions import installed_versions

    with _plain_errors():
        found = {row.package: row.installed for row in installed_versions()}
        found["dpo-helpers"] = version("dpo-helpers")
        print(", ".join(f"{name} {found[name]}" for name in ("dpo-helpers", "torch", "transformers", "datasets")))
    raise typer.Exit


@app.callback()
def _first(
    _: Annotated[
        bool,
        typer.Option("--version", callback=_show_versions, is_eager=True, help="what is installed, for a report"),
    ] = False,
) -> None:
    """Direct Preference Optimization by doing it: the stages of the course, headless."""


def _say_where(model: Any) -> None:
    if processes.is_main():
        print(one_line(f"{model.name}: {model.folder}"))


@command
def data(settings: Settings) -> None:
    """Stage 1: read, check, split and tokenise the preference pairs."""
    from .run.stages import get_data

    found = get_data(settings)
    if processes.is_main():
        facts = (
            f"data: {found.pairs.source}: {len(found.train)} training and {len(found.held_out)} held-out pairs, "
            f"{len(found.pairs.dropped)} rows dropped ({settings.run_dir / 'data'})"
        )
        print(one_line(facts))


@command
def reference(settings: Settings) -> None:
    """Stage 2: the plain model and its log-probabilities."""
    from .run.stages import get_base

    _say_where(get_base(settings))


@command
def sft(settings: Settings) -> None:
    """Stage 3: supervised fine-tuning on the chosen responses."""
    from .run.stages import get_sft

    _say_where(get_sft(settings))


@command
def dpo(settings: Settings) -> None:
    """Stage 5: DPO training at the settings' beta."""
    from .run.stages import get_dpo

    _say_where(get_dpo(settings))


@command
def sweep(settings: Settings) -> None:
    """Stage 6: DPO for every beta of the sweep."""
    from .run.stages import get_sweep

    for model in get_sweep(settings).values():
        _say_where(model)


@command
def generate(settings: Settings) -> None:
    """Stage 7: the same prompts through the three models, and the final model's folder."""
    from .run.outputs import get_final_model, get_generations
    from .show.tables import show_text

    processes.require_one("generate")

    for name, responses in get_generations(settings).items():
        if "/" not in name:
            for response in responses:
                show_text(f"[{name}]{response.prompt.splitlines()[-3]}", response.text)
    print(one_line(f"final model: {get_final_model(settings)}"))


@command
def report(settings: Settings) -> None:
    """Evaluate all models; write results.json, figures/ and report.html."""
    from .run.report import make_report

    processes.require_one("report")
    print(one_line(f"report: {make_report(settings)}"))


@command
def all_(settings: Settings) -> None:
    """All stages, then the report."""
    processes.require_one("all")
    for run in (data, reference, sft, dpo, sweep, generate, report):
        run(settings)


@command
def course(
    settings: Settings,
    in_place: Annotated[bool, typer.Option(help="put outputs into notebooks/ itself, to regenerate them")] = False,
    beyond: Annotated[bool, typer.Option(help="the notebooks in notebooks/beyond/ too")] = False,
) -> None:
    """Execute the seven notebooks in order, then write the report: what `make course` runs."""
    from .run.course import run_course

    processes.require_one("course")
    default = load_settings(settings.profile)  # before the environment changes
    for f in fields(Settings):  # the notebooks read settings from the environment
        value = getattr(settings, f.name)
        if f.name != "runs_dir" and value not in (None, getattr(default, f.name)):
            os.environ[f"DPO_{f.name.upper()}"] = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
    run_course(settings, in_place=in_place, beyond=beyond)


@app.command()
def doctor(
    run: Annotated[Optional[Path], typer.Argument(help="a run of the course, or a TRL output folder")] = None,  # noqa: UP045
) -> None:
    """Say which of fifteen known pains a run shows; without RUN, make each of them happen in a small experiment."""
    from .lesson.doctor import describe, examine, read_run
    from .lesson.pains import PAINS

    with _plain_errors():
        if run is not None:
            print(describe(examine(read_run(run))))
        else:
            for pain in PAINS:
                print(
                    f"{pain.number:2d}. {pain.symptom} ({pain.seen_in})\n    {pain.experiment()}\n    do: {pain.remedy}"
                )


@app.command()
def versions() -> None:
    """Compare the installed packages with the oldest versions that are safe and work; status 2 if one is older."""
    from .tools.versions import check_versions

    with _plain_errors():
        for row in check_versions():
            print(f"{row.package:18s} {row.installed!s:12s} wanted {row.wanted}")


@app.command()
def lesson() -> None:
    """For authors: copy what all notebooks share into each, and write notebooks/exercises/ without the solutions."""
    from .run.course import notebooks_dir
    from .tools.skeleton import write_lessons

    with _plain_errors():
        for path in write_lessons(notebooks_dir()):
            print(path)


@app.command("build-mini")
def build_mini_command(
    out: Annotated[Path, typer.Option(help="folder for the model and tokenizer")] = Path("mini-model"),
) -> None:
    """Rebuild the embedded GPT-2 from nothing, as it ships in dpo_helpers/worlds/mini/model/."""
    from .tools.pretrain import build_mini

    with _plain_errors():
        build_mini(out)


class _Output(io.FileIO):
    """Standard output or error: once it refuses what is written (a closed pipe, a full disk), the rest goes nowhere."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            return len(data)


def _lasting(stream: Any) -> Any:
    """The same stream, of which no write is an error: a character that its encoding lacks is written as its number."""
    if stream is None or (os.name == "nt" and stream.isatty()):  # Windows writes Unicode to its console by itself
        return stream
    stream.flush()
    raw = io.BufferedWriter(_Output(stream.fileno(), "w", closefd=False))
    buffering = {"line_buffering": stream.line_buffering, "write_through": stream.write_through}
    return io.TextIOWrapper(raw, stream.encoding, "backslashreplace", **buffering)


def main() -> None:
    """Entry point. Nothing that is printed ends a run: not in a terminal without UTF-8, not into a closed pipe."""
    sys.stdout, sys.stderr = _lasting(sys.stdout), _lasting(sys.stderr)
    app()
