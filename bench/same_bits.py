"""One run file, one adapter: its SHA-256 on every engine, whole and stopped, with options whose arithmetic depends on orders.

    python bench/same_bits.py [--quick] [--flower] [--out FILE]

A run of three rounds on a random two-layer mixture. Columns are ways to carry it out: whole, stopped in the last round and resumed,
in two and three worker processes, the latter stopped too; with `--flower` also Flower's simulation and a SuperLink with SuperNodes
over TLS, where [simulation] is refused and that row has no dropout. Rows are sets of options in float32 and bfloat16. Exit code
1 if a row has two hashes, or if an option changes nothing.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from fault_cases.small_run import small_settings, write_base

from ubsmoe.config import RunSettings, to_json
from ubsmoe.engines.local import LocalEngine, process_pool, score_in
from ubsmoe.engines.simulated import as_simulated
from ubsmoe.server.federation import build_federation
from ubsmoe.server.run import run
from ubsmoe.storage.json_text import encode_json
from ubsmoe.storage.runfolder import RunFolder, atomic_write

OPTIONS: dict[str, dict[str, Any]] = {
    "clipping": {"train.clip_norm": 0.01},
    "weight decay": {"train.weight_decay": 0.1},
    "accumulation": {"train.gradient_accumulation": 3},
    "router": {"adapter.router": "trained"},
    "attention": {"adapter.attention": "trained"},
    "dropout": {"simulation.dropout": 0.35, "rounds.quorum": 0.25},
    "drawn clients": {"clients.per_round": 3},
    "robust": {"robust.rule": "multi_krum", "robust.attackers": 1, "robust.clip_norm": 0.01, "clients.count": 6},
    "private": {"privacy.noise_multiplier": 0.5, "privacy.clip_norm": 0.05, "privacy.seed": 7},
    "bfloat16 on the wire": {"wire.dtype": "bfloat16"},
    "compensation": {"method.compensation": {"rank": 4, "tokens": 64, "every": 1}},
    "compensation by clients": {"method.compensation": {"rank": 4, "tokens": 64, "every": 1, "fit": "clients"}},
}
TOGETHER = ("clipping", "weight decay", "accumulation", "router", "attention", "dropout", "drawn clients")
COMMON = {
    "train.clip_norm": None,
    "train.local_steps": 3,
    "evaluate.before": False,
}  # the first step of AdamW knows no length


class Stopped(Exception):
    """The run was stopped here."""


def local(settings: RunSettings, folder: Path, workers: int = 1, stop: bool = False) -> str:
    """The adapter's hash; `stop` ends the run in its last round, when the first update has come, and starts it again."""
    federation = build_federation(settings)

    def report(event: str, number: int, fields: dict[str, Any]) -> None:
        if stop and event == "client" and number == settings.train.rounds:
            raise Stopped

    with suppress(Stopped), process_pool(federation, workers) as pool:
        engine = LocalEngine(federation.trainer, federation.examples, federation.clients, pool=pool)
        score_all = partial(score_in, pool) if pool else None
        with RunFolder.open_or_create(folder, to_json(settings)) as opened:
            return str(run(federation, opened, as_simulated(engine, federation), report, score_all)["adapter_sha256"])
    return local(settings, folder, workers)


def flower(settings: RunSettings, folder: Path, engine: str) -> str:
    run_file = folder.with_suffix(".toml")
    table = settings.model_dump(mode="json", exclude_none=True, exclude_defaults=True)
    atomic_write(run_file, "\n".join(toml_lines(table, "")).encode())
    command = [sys.executable, "-m", "ubsmoe", "run", str(run_file), "--out", str(folder), "--engine", engine]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return str(json.loads((folder / "summary.json").read_text())["adapter_sha256"])


def toml_lines(table: dict[str, Any], prefix: str) -> Iterator[str]:
    yield from (f"{key} = {json.dumps(value)}" for key, value in table.items() if not isinstance(value, dict))
    for key, value in table.items():
        if isinstance(value, dict):
            yield from (f"[{prefix}{key}]", *toml_lines(value, f"{prefix}{key}."))


WAYS = {
    "whole": local,
    "resumed": partial(local, stop=True),
    "2 workers": partial(local, workers=2),
    "3 workers": partial(local, workers=3),
    "3 workers, resumed": partial(local, workers=3, stop=True),
}
ON_FLOWER = {"simulation": partial(flower, engine="simulation"), "superlink": partial(flower, engine="superlink")}


def rows(quick: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """What is tried: nothing, each option alone, and all that go together, in both precisions."""
    alone = {} if quick else {name: OPTIONS[name] for name in OPTIONS}
    together = {key: value for name in TOGETHER for key, value in OPTIONS[name].items()}
    for dtype in ("float32", "bfloat16"):
        for name, changes in {"none": {}, **alone, "all": together}.items():
            yield f"{name}, {dtype}", {"model.dtype": dtype, **changes}
        without = {key: value for key, value in together.items() if key != "simulation.dropout"}
        yield f"all but dropout, {dtype}", {"model.dtype": dtype, **without}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="no option alone")
    parser.add_argument("--flower", action="store_true", help="on Flower's own processes too, where nothing drops out")
    parser.add_argument("--out", type=Path, help="write the table as JSON")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    table: dict[str, dict[str, str]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        base = write_base(root / "base")
        for name, changes in rows(chosen.quick):
            settings = small_settings(base, COMMON | changes)
            flower_too = chosen.flower and name.startswith("all but dropout")
            ways = WAYS | (ON_FLOWER if flower_too else {})
            table[name] = {
                way: carry(settings, root / f"run-{len(table)}-{i}") for i, (way, carry) in enumerate(ways.items())
            }
            found = {*table[name].values()}
            print(
                f"| {name} | {' '.join(table[name])} | {'`' + found.pop()[:16] + '`' if len(found) == 1 else found} |",
                flush=True,
            )
    if chosen.out:
        atomic_write(chosen.out, encode_json(table, indent=1))
    one_each = all(len({*ways.values()}) == 1 for ways in table.values())
    sys.exit(not one_each or len({ways["whole"] for ways in table.values()}) != len(table))


if __name__ == "__main__":
    main()
