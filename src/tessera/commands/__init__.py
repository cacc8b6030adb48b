"""The commands of `tessera`: each is a function in a module of its own; this file only makes them one program.

Exit codes: 0 all is well; 1 something was computed wrong, lost or missing; 2 bad input; 3 no backend can run it.
"""

from __future__ import annotations

from typing import Annotated

import typer

from tessera import __version__
from tessera.commands.bench import bench
from tessera.commands.check import check
from tessera.commands.demo import demo
from tessera.commands.doctor import doctor
from tessera.commands.explain import explain
from tessera.commands.explain_cache import explain_cache
from tessera.commands.learn import learn

app = typer.Typer(
    name="tessera",
    help="Exact attention in tiles: on a Hopper GPU at the speed of the chip, on any CPU without a change to the program.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_show_locals=False,
)


def _print_version(asked: bool) -> None:
    if asked:
        print(__version__)
        raise typer.Exit


@app.callback()
def _about(
    version: Annotated[bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print it.")] = False,
) -> None:
    pass


for _command in (demo, doctor, explain, explain_cache, check, bench, learn):
    app.command()(_command)
