"""The same experiment under Flower: sites train behind their SuperNodes, the server mixes and keeps the run directory.

`site.py`: what a site computes, and what it keeps on its disk. `remote.py`: the run's rounds and evaluations as the server sees
them. `messages.py`: what travels. `client_app.py`, `server_app.py`, `strategy.py`: Flower's side.
"""
