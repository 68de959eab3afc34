"""The ``qwen2x`` command: a group whose commands are imported when they are called."""

from __future__ import annotations

import importlib
import io
import sys
from importlib import metadata

import click

from qwen2x.cli.standard_output import OutputError, StandardOutput
from qwen2x.quantize.errors import Qwen2xError

# Name: one line for `qwen2x --help`, so that it imports no command.
COMMANDS = {
    "export": "Convert a checkpoint into a bundle, quantized if wanted.",
    "run": "Answer one prompt.",
    "chat": "Talk with a model in the terminal.",
    "validate": "Compare a bundle's logits with PyTorch's.",
    "compare": "Show bundles of one checkpoint in one table.",
    "bench": "Measure prefill and decode speed.",
    "inspect": "Show what a checkpoint or bundle is.",
    "demo": "The whole way on the small checkpoint that ships with qwen2x.",
    "doctor": "Show what is usable here, and what to install for the rest.",
}


class LazyGroup(click.Group):
    """Finds a command in the module of its name."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order of the table."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Imports the command's module."""
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"qwen2x.cli.{cmd_name}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The table, without importing anything."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="\b\nExample: qwen2x export ./Qwen2.5-0.5B-Instruct --to onnx --bits 4 -o qwen-int4",
)
@click.version_option(metadata.version("qwen2x"), prog_name="qwen2x")
def cli() -> None:
    """Export Qwen2 models to ONNX, quantize them, run them, and check them against PyTorch."""


def main() -> None:
    """Runs the command and exits: 0 good, 1 a check failed, 2 usage or input, 130 Ctrl-C.

    141 as other programs where the reader of our output went away, which `| head` does.
    """
    code: int | str | None
    try:
        _prepare_streams()
        code = cli.main(prog_name="qwen2x", standalone_mode=False)
    except OutputError as error:
        code = _complain(str(error))
        sys.stdout = None  # or Python would try once more when it ends, and say so
    except Qwen2xError as error:
        code = _complain(str(error))
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        code = 2
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        hint = f" (see {context.command_path} --help)" if context else ""
        code = _complain(error.format_message() + hint)
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        code = 130
    except SystemExit as end:
        # So click ends a broken pipe, with the 1 that here means that a check failed.
        code = 141 if end.code == 1 else end.code
    sys.exit(code)


def _prepare_streams() -> None:
    """Prompts and answers are UTF-8, whatever the locale (or a pipe on Windows) would make them."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # File names may hold any bytes; their escapes are JSON's too.
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")
    stdout = sys.stdout
    if stdout is None:
        raise OutputError("expected an open standard output, got a closed one; try >/dev/null")
    if stdout is sys.__stdout__ and isinstance(stdout, io.TextIOWrapper):
        sys.stdout = StandardOutput(
            stdout.buffer,
            encoding="utf-8",
            errors="backslashreplace",
            line_buffering=stdout.line_buffering,
        )


def _complain(message: str) -> int:
    click.echo("qwen2x: error: " + " ".join(message.split()), err=True)
    return 2


if __name__ == "__main__":
    main()
