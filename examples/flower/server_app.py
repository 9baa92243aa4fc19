"""The server: asks sites, mixes what they answer, keeps the run directory."""

from pathlib import Path

from prefmesh.flower.server_app import server_app

app = server_app(Path(__file__).parent)
