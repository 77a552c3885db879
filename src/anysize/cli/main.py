"""The `anysize` command: dispatch, and the one place where errors become a sentence and an exit code."""

from __future__ import annotations

import gc
import json
import sys
from typing import Any

import typer

from anysize import __version__
from anysize.cli import (
    apply,
    calibrate,
    compare,
    demo,
    draft,
    evaluate,
    inspect,
    plan,
    report,
    resize,
    train,
    verify,
)  # fmt: skip
from anysize.errors import AnysizeError, InputError

app = typer.Typer(
    name="anysize",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Make a transformer of any size out of a pretrained one, and prove what it kept.",
)
for command in (
    resize.resize, plan.plan, apply.apply, calibrate.calibrate, verify.verify, inspect.inspect, train.train,
    compare.compare, report.report, draft.draft, demo.demo,
):  # fmt: skip
    app.command()(command)
app.command("eval")(evaluate.evaluate)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _options(  # pyright: ignore[reportUnusedFunction]
    version: bool = typer.Option(False, "--version", callback=_print_version, is_eager=True, help="Print the version."),
) -> None:
    del version


# typer carries its own copy of click, whose place differs between versions.
_UsageError: Any = typer.BadParameter.__base__


def _fail(error: AnysizeError) -> int:
    if "--json" in sys.argv:
        typer.echo(json.dumps({"error": str(error), "kind": type(error).__name__, "exit_code": error.exit_code}))
    typer.echo(f"anysize: {error}", err=True)
    return error.exit_code


# Importing torch and transformers makes a million objects that live to the end. Looking through them again and again
# while they are made, and once more on the way out, costs a conversion more than a second.
_OBJECTS_BEFORE_COLLECTING = 1_000_000


def main() -> None:
    """Run the command line: exit 0 on success, 1 when a proof fails, 2 for input that cannot be used, 130 on
    Ctrl-C, 143 on SIGTERM."""
    gc.set_threshold(_OBJECTS_BEFORE_COLLECTING)
    try:
        sys.exit(app(sys.argv[1:] or ["--help"], standalone_mode=False))
    except AnysizeError as error:
        sys.exit(_fail(error))
    except _UsageError as error:
        sys.exit(_fail(InputError(f"{error.format_message().rstrip('.')}; --help lists what there is")))
    except RuntimeError as error:
        # By its name: torch is not here yet where a command needs none.
        if type(error).__name__ != "OutOfMemoryError":
            raise
        why = " ".join(str(error).split(". ")[0].split())
        fix = "give a smaller batch or shorter sequences, or hide the accelerator with CUDA_VISIBLE_DEVICES="
        sys.exit(_fail(InputError(f"the accelerator has no memory left ({why}): {fix}")))
    finally:
        gc.freeze()
