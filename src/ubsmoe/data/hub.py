"""The Hugging Face hub is asked only where it can be reached: its client would otherwise try for minutes."""

import socket
from functools import cache
from urllib.parse import urlsplit
from urllib.request import getproxies

SECONDS = 3.0  # to open one connection


@cache
def go_offline_without_network() -> None:
    """Let the hub's client use its cache alone in this process, at once, if nothing can be reached. Tried once.

    The user's own HF_HUB_OFFLINE=1 does the same without trying.
    """
    from huggingface_hub import constants

    scheme = urlsplit(constants.ENDPOINT).scheme
    proxy = getproxies().get(scheme)
    place = urlsplit(proxy if proxy and "://" in proxy else constants.ENDPOINT)
    try:
        port = place.port or (443 if place.scheme == "https" else 80)
        socket.create_connection((place.hostname or "", port), SECONDS).close()
    except (OSError, ValueError):
        constants.HF_HUB_OFFLINE = True
