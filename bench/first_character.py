"""Seconds from the start of each verb to its first character on a terminal, and to its end: nobody should look at nothing.

Every verb runs on a pseudo-terminal with the quickstart's run file, or with a run that has ended. Verbs that stay, as `flower up`,
are stopped after their first character. `data` and `base upcycle` need files from elsewhere and are left out.

python bench/first_character.py [--run RUN] [--source DIR] [--out FILE]    DIR: the src of another commit, to compare with
"""

import argparse
import json
import os
import pty
import select
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parents[1]
SMALL = (
    "train.rounds=1", "train.local_steps=1", "train.batch_size=4", "evaluate.max_examples=1", "evaluate.before=false",
    "method.compensation.tokens=512", "data.synthetic.train_examples=200", "data.synthetic.test_examples=8",
)  # fmt: skip
SETS = [word for one in SMALL for word in ("--set", one)]
RUN = str(HERE / "runs" / "quickstart.toml")
STAY = ("serve", "flower up")
VERBS: dict[str, list[str]] = {
    "--help": [],
    "methods": [],
    "new": ["new.toml"],
    "run": [RUN, "--out", "a", *SETS],
    "compare": [RUN, "--methods", "fedavg", "--seeds", "1", "--out", "b", *SETS],
    "eval": ["a", "--tier", "1"],
    "report": ["a", "--out", "r.html"],
    "plan": [RUN, *SETS],
    "export": ["a", "--format", "merged", "--tier", "1", "--out", "merged"],
    "check": ["merged", "ubsmoe-tiny"],
    "generate": ["merged", "The colour of", "--max-new-tokens", "4"],
    "serve": ["merged", "--port", "8765"],
    "base hash": ["ubsmoe-tiny"],
    "base prepare": ["ubsmoe-tiny", "--out", "prepared"],
    "study alignment": ["a", "--out", "alignment"],
    "study bias-floor": ["--out", "floor.csv"],
    "study figures": ["a", "--out", "figures"],
    "flower init": ["app", "--run", RUN],
    "flower keys": ["keys", "--host", "localhost"],
    "flower status": ["a"],
    "flower up": ["app", "--nodes", "1"],
}


def watched(
    command: list[str], folder: Path, environment: dict[str, str], stays: bool, longest: float
) -> dict[str, Any]:
    """Seconds to the first character and to the end of a command on a pseudo-terminal."""
    began, first = time.monotonic(), None
    pid, terminal = pty.fork()
    if not pid:
        os.chdir(folder)
        os.execve(command[0], command, environment)
    while time.monotonic() - began < longest:
        if select.select([terminal], [], [], 0.01)[0]:
            try:
                if not os.read(terminal, 65536):
                    break
            except OSError:
                break
            first = first or time.monotonic() - began
            if stays:
                break
    if stays or time.monotonic() - began >= longest:
        os.kill(pid, signal.SIGTERM)
    _, status = os.waitpid(pid, 0)
    os.close(terminal)
    code = None if stays else os.waitstatus_to_exitcode(status)
    return {"first": first and round(first, 2), "seconds": round(time.monotonic() - began, 2), "exit": code}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--source", type=Path, default=HERE / "src", help="folder with the package ubsmoe")
    parser.add_argument("--run", type=Path, help="a run that has ended; made by the verb `run` when left out")
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument("--longest", type=float, default=120.0, help="seconds after which a verb is stopped")
    asked = parser.parse_args()
    environment = {**os.environ, "PYTHONPATH": str(asked.source), "COLUMNS": "80", "TERM": "xterm"}
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        if asked.run:
            shutil.copytree(asked.run, Path(name) / "a")
            VERBS["run"][2] = "another"
        for verb, words in VERBS.items():
            command = [sys.executable, "-m", "ubsmoe", *verb.split(), *words]
            found[verb] = watched(command, Path(name), environment, verb in STAY, asked.longest)
            print(
                f"{verb:<18}{found[verb]['first']!s:>8}{found[verb]['seconds']!s:>8}  exit {found[verb]['exit']}",
                flush=True,
            )
    if asked.out:
        asked.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
