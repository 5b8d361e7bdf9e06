"""Flower as the engine: a server that reaches clients over its Grid, and the app that every node runs.

Only client.py, server.py and record.py import flwr, so that an app's folder, keys and a local federation can be made
without. Flower's telemetry is off in every process that imports this.
"""

import os

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
