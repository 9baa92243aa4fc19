"""What a person at a terminal sees: progress on stderr, tables on stdout, one line for an error."""

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeRemainingColumn,
)

from prefmesh.errors import Diverged, InputError, PeerLost

# Typer carries a copy of click from 0.2x on; whichever it uses, this is the base of its complaints about a command line.
USAGE_ERROR: Any = next(cls for cls in typer.BadParameter.__mro__ if cls.__name__ == "ClickException")

out = Console()
err = Console(stderr=True)


class ProgressListener:
    """One bar per run: rounds, loss, held-out accuracy, time left. Draws nothing when stderr is no terminal."""

    def __init__(self, progress: Progress, title: str):
        self.progress, self.title = progress, title
        self.task = progress.add_task(title, total=None, state="")
        self.state: dict[str, str] = {}

    def stage(self, text: str) -> None:
        """What is being prepared."""
        self.progress.update(self.task, state=text)

    def round(self, round_: int, rounds: int, metrics: Mapping[str, Any]) -> None:
        """A round is done."""
        if "loss" in metrics:
            self.state["loss"] = f"{metrics['loss']:.4f}"
        if "eval/rewards/accuracies" in metrics:
            self.state["accuracy"] = f"{100 * metrics['eval/rewards/accuracies']:.1f} %"
        text = ", ".join(f"{key} {value}" for key, value in self.state.items())
        self.progress.update(self.task, total=rounds, completed=round_, state=text)


@contextmanager
def progress(shown: bool = True) -> Iterator[Callable[[str], ProgressListener]]:
    """A scope in which progress is drawn if it is `shown`; gives what makes a listener per run."""
    columns = (
        SpinnerColumn(finished_text="✓"),
        TextColumn("{task.description}"),
        BarColumn(bar_width=10),
        MofNCompleteColumn(),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[state]}"),
    )
    with Progress(*columns, console=err, disable=not (shown and err.is_terminal)) as bars:
        yield lambda title: ProgressListener(bars, title)


@contextmanager
def warmstart_progress() -> Iterator[Callable[[Any], None]]:
    """One bar for the stages of a warm start."""
    with progress() as bars:
        listener = bars("warm start")

        def show(step: Any) -> None:
            state = f"{step.stage}  loss {step.loss:.3f}  {step.tokens_per_second:,.0f} tokens/s"
            listener.progress.update(listener.task, total=step.steps, completed=step.step, state=state)

        yield show


def print_json(value: Any) -> None:
    """JSON alone, for machines."""
    import json

    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def said(path: Path | str) -> None:
    """Where something was written, or another result, on a line of its own that is never wrapped or styled."""
    sys.stdout.write(f"{path}\n")


def guarded(command: Callable[[], Any]) -> int:
    """Run a command; its exit code. Errors that are the user's become one line on stderr.

    What ends all of several processes alike is said by the first of them.
    """
    from prefmesh.interruption import Interrupted

    try:
        code = command()
    except InputError as error:
        return _fail(str(error), 2)
    except Diverged as error:
        return _fail(str(error), 3) if _first_of_many() else 3
    except PeerLost as error:
        return _fail(str(error), 4)
    except Interrupted as error:
        return _fail(str(error), 130) if _first_of_many() else 130
    except (KeyboardInterrupt, typer.Abort):
        return _fail("interrupted", 130)
    except typer.Exit as stop:
        return stop.exit_code
    except USAGE_ERROR as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # its message is the help itself
            sys.stderr.write(error.format_message() + "\n")
            return 2
        return _fail(
            f"{error.format_message()} (prefmesh --help, or --help after a command, tells what there is)", 2
        )
    except BrokenPipeError:
        return 0
    if code == 130:  # Typer catches Ctrl-C itself, and returns this
        return _fail("interrupted", 130)
    return code if isinstance(code, int) else 0


def _first_of_many() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _fail(message: str, code: int) -> int:
    sys.stderr.write("prefmesh: " + " ".join(message.split()) + "\n")
    return code
