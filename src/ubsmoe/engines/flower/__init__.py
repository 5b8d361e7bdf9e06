"""Flower as the engine: a server that reaches clients over its Grid, and the app that every node runs. Only here is flwr imported.

Telemetry is off once this is imported; `deploy` says the same, and more, to Flower's own processes.
"""

import os
from importlib.util import find_spec

from ubsmoe.errors import UserError

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
if find_spec("flwr") is None:
    raise UserError("this needs Flower: pip install 'ubsmoe[flower]'")
