"""A whole federated run, three ways: the same base, records, clients, tiers, rounds, steps and evaluation.

    ours      ubsmoe run RUN.toml with [method] name = "fedavg"
    workers   the same in two worker processes
    flower    Flower's simulation of a plain app, as one writes it today: FedAvg on PEFT's `target_parameters`, a base loaded per
              message, its own training loop; the server ranks candidates and generates with transformers

Each way runs in processes of its own, in turns. The plain app gets the tokens of the same clients and questions, and sets the
router's top_k where ours gives a tier its K. Measured: wall seconds, CPU seconds of all processes, the largest sum of their memory
(looked at five times a second; what they share counts once), bytes of adapters that travelled, and per tier loss and accuracy
after the last round.

    python bench/whole_run.py [--run runs/quickstart.toml] [--repeats 3] [--set KEY=VALUE ...] [--out FILE]
    python bench/whole_run.py --quick        one round of one step
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from ubsmoe.config import RunSettings, load_run, parse_value
from ubsmoe.engines.flower.app import PYPROJECT
from ubsmoe.engines.flower.localhost import local_federation
from ubsmoe.model.load import shipped_path
from ubsmoe.server.federation import build_federation

RESULTS = Path(__file__).resolve().parent / "results" / "whole_run.json"
PLAIN = Path(__file__).resolve().parent / "plain_flower"
SAMPLE_SECONDS = 0.2
WAYS = ("ours", "workers", "flower")
QUICK = ["train.rounds=1", "train.local_steps=1", "evaluate.max_examples=2", "data.synthetic.train_examples=200"]


def write_job(settings: RunSettings, base: str, path: Path) -> None:
    """What the plain app needs to know, as JSON: tokens of clients and questions, tiers, and how to train and evaluate."""
    federation = build_federation(settings)
    questions = [
        {
            "prompt": list(question.prompt),
            "candidates": [list(candidate) for candidate in question.candidates],
            "gold": question.gold,
            "task": task,
            "answer": question.example.answer,
        }
        for task, group in federation.questions.items()
        for question in group
    ]
    job = {
        "base": base,
        "clients": [
            {
                "top_k": profile.top_k,
                "examples": [[list(one.input_ids), one.prompt_length] for one in federation.examples[profile.client]],
            }
            for profile in federation.clients
        ],
        "tiers": [profile.top_k for profile in federation.tiers],
        "questions": questions,
        "rank": federation.clients[0].rank,
        "alpha": federation.shape.alpha,
        "train": settings.train.model_dump(),
        "evaluate": settings.evaluate.model_dump(),
        "dtype": str(federation.model.model.dtype).removeprefix("torch."),
        "seed": settings.seed,
    }
    path.write_text(json.dumps(job))


def command_of(way: str, arguments: list[str], folder: Path) -> list[str]:
    """The process that carries it out."""
    if way == "flower":
        return [sys.executable, __file__, "--flower", str(folder)]
    workers = ["--workers", "2"] if way == "workers" else []
    return [sys.executable, "-m", "ubsmoe", "run", *arguments, "--out", str(folder / "out"), *workers]


def measured(command: list[str], log: Path) -> dict[str, float]:
    """Wall and CPU seconds of a process and all that it starts, and their largest resident set in MiB."""
    began, cpu, peak = time.perf_counter(), {}, 0
    with log.open("wb") as out:
        process = psutil.Popen(command, stdout=out, stderr=subprocess.STDOUT)
        while process.poll() is None:
            resident = 0
            for one in [process, *process.children(recursive=True)]:
                try:
                    times, memory = one.cpu_times(), one.memory_full_info()
                except psutil.Error:
                    continue
                cpu[one.pid] = times.user + times.system
                resident += memory.pss  # what several processes share counts once
            peak = max(peak, resident)
            time.sleep(SAMPLE_SECONDS)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{log.read_text()[-3000:]}")
    return {"wall_seconds": time.perf_counter() - began, "cpu_seconds": sum(cpu.values()), "peak_mib": peak / 2**20}


def scores_of(way: str, folder: Path) -> dict[str, Any]:
    """Loss and accuracies per tier after the last round, and bytes up and down."""
    if way == "flower":
        return dict(json.loads((folder / "result.json").read_text()))
    events = [json.loads(line) for line in (folder / "out" / "events.jsonl").read_text().splitlines()]
    after = json.loads((folder / "out" / "summary.json").read_text())["after"]
    tiers = [{key: tier["macro"][key] for key in ("loss", "accuracy", "mc_accuracy")} for tier in after]
    clients = [event for event in events if event["event"] == "client"]
    moved = sum(event.get("upload_bytes", 0) + event.get("download_bytes", 0) for event in clients)
    return {"tiers": tiers, "bytes": moved}


def simulate(folder: Path) -> None:
    """Run the plain app in `folder` in Flower's simulation, two clients at a time."""
    with local_federation(folder, len(json.loads((folder / "job.json").read_text())["clients"]), simulated=True) as up:
        up.run()


def write_plain_app(folder: Path, job: Path) -> None:
    """A copy of the plain app, with the job beside it."""
    for source in PLAIN.glob("*.py"):
        (folder / source.name).write_bytes(source.read_bytes())
    (folder / "job.json").write_bytes(job.read_bytes())
    config = f'job = "{folder}/job.json"\nresult = "{folder}/result.json"'
    (folder / "pyproject.toml").write_text(PYPROJECT.format(name='"plain"', version="0.1.0", config=config))
    (folder / "LICENSE").write_text("none")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/quickstart.toml"))
    parser.add_argument("--set", action="append", default=[], dest="changes", help="of the run file, for all ways")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--ways", nargs="*", choices=WAYS, default=WAYS)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, help=f"default: {RESULTS}; with --quick nothing is kept")
    parser.add_argument("--flower", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.flower:
        return simulate(options.flower)
    changes = ["method.name=fedavg", *(QUICK if options.quick else []), *options.changes]
    arguments = [str(options.run), *(word for change in changes for word in ("--set", change))]
    options.out = options.out or (None if options.quick else RESULTS)
    record: dict[str, Any] = {
        "run": str(options.run),
        "changes": changes,
        "platform": platform.platform(),
        "load_average_at_start": os.getloadavg()[0],
        "ways": {way: [] for way in options.ways},
    }
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        settings = load_run(options.run, dict(_parsed(change) for change in changes))
        write_job(settings, str(shipped_path(settings.model.base) or settings.model.base), work / "job.json")
        for turn in range(1 if options.quick else options.repeats):
            for way in options.ways:
                folder = work / f"{way}-{turn}"
                folder.mkdir()
                if way == "flower":
                    write_plain_app(folder, work / "job.json")
                row = measured(command_of(way, arguments, folder), folder / "log") | scores_of(way, folder)
                record["ways"][way].append(row)
                print(way, json.dumps(row), flush=True)
                if options.out:
                    options.out.write_text(json.dumps(record, indent=1) + "\n")
    show(record["ways"])


def _parsed(change: str) -> tuple[str, Any]:
    key, _, value = change.partition("=")
    return key, parse_value(value)


def show(ways: dict[str, list[dict[str, Any]]]) -> None:
    """Medians, and each way over the first."""
    first, columns = next(iter(ways.values())), ("wall_seconds", "cpu_seconds", "peak_mib", "bytes")
    for way, rows in ways.items():
        cells = []
        for column in columns:
            median, base = (statistics.median(row[column] for row in some) for some in (rows, first))
            cells.append(f"{column} {median:.1f} ({median / base:.2f} x)")
        loss = statistics.fmean(tier["loss"] for tier in rows[0]["tiers"])
        print(f"{way:>8}  " + "  ".join(cells) + f"  mean loss {loss:.4f}")


if __name__ == "__main__":
    main()
