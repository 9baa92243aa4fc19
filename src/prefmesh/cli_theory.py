"""The commands of theory: what can be known before a run. Merged into `prefmesh` by `cli.py`."""

import typer

theory_commands = typer.Typer(rich_markup_mode=None)
