"""The group of commands. A command's module is imported only when that command is used."""

from __future__ import annotations

from importlib import import_module

import click
from click.shell_completion import CompletionItem

from trimode.cli.interrupts import exit_on_interrupt
from trimode.common.version import __version__

# In the order of the help text. The module `trimode.cli.<name>` holds the click command, as `command`.
SUMMARIES = {
    "quantize": "Quantise a checkpoint to w4a16.",
    "build": "Build the engine directory of a checkpoint.",
    "compile": "Compile the plans of an engine that was built with --emit-only.",
    "convert": "Convert an engine between targets cuda and tensorrt.",
    "export": "Export a checkpoint's AR network for another program.",
    "info": "Describe an engine directory.",
    "doctor": "Show what this machine can build and run.",
    "audit": "List an engine's GPU kernels and the bytes they move.",
    "generate": "Answer one prompt.",
    "bench": "Measure throughput and latency.",
    "serve": "Serve a model over the OpenAI API.",
    "triton": "Write a model repository for Triton Inference Server.",
    "dynamo": "Serve an engine as a worker of NVIDIA Dynamo.",
    "cache": "List or remove the engines that were built from checkpoints.",
}


class LazyGroup(click.Group):
    """Lists its commands from :data:`SUMMARIES`, without importing them."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return list(SUMMARIES)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in SUMMARIES:
            return None
        with exit_on_interrupt():
            command: click.Command = import_module(f"trimode.cli.{cmd_name}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        with formatter.section("Commands"):
            formatter.write_dl(list(SUMMARIES.items()))

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        names = [CompletionItem(name, help=text) for name, text in SUMMARIES.items() if name.startswith(incomplete)]
        return names + click.Command.shell_complete(self, ctx, incomplete)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(version=__version__, prog_name="trimode")
def commands() -> None:
    """Build and run tri-mode language models.

    One checkpoint decodes in three modes: autoregression, block diffusion, and self-speculation.
    """
