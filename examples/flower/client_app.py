"""A site: local steps on its own preferences. Flower's mods go in here: `client_app([LocalDpMod(...)])`."""

from prefmesh.flower.client_app import client_app

app = client_app()
