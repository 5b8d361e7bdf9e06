"""Freed memory: kept for the next step, and given back where it is too much; in a process whose heap nobody else has used."""

import json
import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is asked")

HOLES = """
import json
from pathlib import Path

import torch

from ubsmoe.client.allocator import give_back_freed_memory, keep_freed_memory


def own_mib():
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["RssAnon"].split()[0]) / 1024


keep_freed_memory()
blocks = [torch.ones(1 << 18) for _ in range(200)]  # a MiB each
full = own_mib()
kept = blocks[::2]
del blocks
holes, small = own_mib(), give_back_freed_memory()
given = give_back_freed_memory(beyond=1 << 20)
sums = {block.sum().item() for block in kept}
print(json.dumps({"full": full, "holes": holes, "small": small, "given": given, "after": own_mib(), "sums": list(sums)}))
"""


def test_holes_between_tensors_are_given_back_beyond_a_bound_alone() -> None:
    run = subprocess.run([sys.executable, "-c", HOLES], check=True, capture_output=True, text=True)
    found = json.loads(run.stdout)
    assert found["holes"] > found["full"] - 10, "mallopt did not keep what was freed"
    assert not found["small"] and found["given"]
    assert found["after"] < found["holes"] - 80, "of 100 MiB"
    assert found["sums"] == [float(1 << 18)], "what is in use was touched"
