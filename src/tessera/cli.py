"""The `tessera` command. Its commands stand in tessera.commands, which needs typer and rich; this file needs neither."""

from __future__ import annotations

import sys
from importlib.util import find_spec

NEEDED = ("typer", "rich")


def main() -> None:
    """Run the command line; where typer or rich is missing, say how to get them and exit with 1."""
    missing = [package for package in NEEDED if find_spec(package) is None]
    if missing:
        print(f"tessera: the command line needs {' and '.join(missing)}: pip install 'tessera-attn[cli]'", file=sys.stderr)
        raise SystemExit(1)
    from tessera.commands import app

    app()
