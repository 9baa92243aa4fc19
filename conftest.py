"""Doctests of modules that need an extra are looked for only where it is installed."""

from importlib.util import find_spec

NAMES = ("aggregation", "client_app", "messages", "server_app")
collect_ignore = [] if find_spec("flwr") else [f"src/prefmesh/flower/{name}.py" for name in NAMES]
