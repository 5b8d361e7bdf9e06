"""What stands for skipped experts, before any training: loss and accuracy of a base at every K, by form, rank and text to fit on.

    share      of the loss gap from K to K_max that the form closes, the gap being that of the run file's `rescale`
    explained  of the missing sum's square, mean over layers
    FLOPs      of a training step, over the same K without a compensation

python bench/compensation.py BASE [--tokens 4096] [--questions 320]     prints a table, writes docs/data/compensation_{name}.csv
"""

import argparse
import csv
import time
from pathlib import Path

import torch

from ubsmoe.config import parse_run
from ubsmoe.data.synthetic import SyntheticQA
from ubsmoe.data.tokens import pad_id, tokenize
from ubsmoe.methods.method import install_adapter
from ubsmoe.model.compensation_fit import FormSettings, fit_compensation
from ubsmoe.server.calibration import in_batches, written_by_base
from ubsmoe.server.evaluate import evaluate, prepare
from ubsmoe.server.federation import build_server
from ubsmoe.server.start import start_state

ROOT = Path(__file__).resolve().parent.parent
FORMS = [
    FormSettings(form="none"),
    FormSettings(form="constant"),
    FormSettings(form="elementwise"),
    FormSettings(form="stand_ins", rank=16),
    FormSettings(form="stand_ins", rank=64),
    FormSettings(form="map", rank=16),
    FormSettings(form="map", rank=64),
    FormSettings(form="map", rank=1024),
    FormSettings(form="map", rank=64, slices=2),
    FormSettings(form="map", rank=64, slices=4),
    FormSettings(form="none", slices=2),
]


def main() -> None:
    """Measure one base."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--questions", type=int, default=320)
    args = parser.parse_args()
    torch.set_num_threads(1)
    settings = parse_run(
        {
            "model": {"base": args.base},
            "data": {"train": "synthetic"},
            "evaluate": {"max_new_tokens": 8},
            "tiers": {"budgets": [0.125, 0.25, 0.5, 1.0], "ranks": [4, 8, 16, 32]},
        }
    )
    server = build_server(settings, weights=True)
    model, world = server.model, SyntheticQA(0, 48, "pretraining")
    known = {"known": world.examples("test", args.questions, seed=1)}
    questions = prepare(known, server.tokenizer, settings.data, settings.evaluate)
    texts = {
        "base": written_by_base(model, server.tokenizer, settings, args.tokens),
        "world": tokenize(world.examples("train", args.tokens // 24, seed=2), server.tokenizer, settings.data, "train"),
    }
    adapter, top_ks = start_state(server).adapters, [profile.top_k for profile in server.tiers]
    rows = []

    def score(form: str, text: str, top_k: int, explained: float, seconds: float) -> None:
        found = evaluate(model, server.tokenizer, questions, settings.evaluate)["macro"]
        rows.append(
            {
                "form": form,
                "text": text,
                "top_k": top_k,
                "loss": found.loss,
                "accuracy": found.accuracy,
                "explained": explained,
                "fit_seconds": seconds,
            }
        )
        print(
            f"{form:22} {text:6} K={top_k}  loss {found.loss:.4f}  accuracy {found.accuracy:.1%}  "
            f"explained {explained:.3f}  fit {seconds:.1f} s",
            flush=True,
        )

    for profile in server.tiers:
        install_adapter(model, adapter, profile, settings.adapter.alpha)
        score("today", "", profile.top_k, 0.0, 0.0)
    for text, written in texts.items():
        print(
            text,
            len(written),
            sum(len(one.input_ids) for one in written),
            repr(server.tokenizer.decode(written[0].input_ids)),
        )
        batches = in_batches(written, pad_id(server.tokenizer))
        for form in FORMS:
            began = time.process_time()
            fitted = fit_compensation(model, batches, top_ks, form)
            seconds = time.process_time() - began
            name = f"{form.form} r={form.rank} n={form.slices}"
            for top_k in top_ks[:-1]:
                model.set_top_k(top_k)
                shares = fitted.explained[top_k]
                score(name, text, top_k, sum(shares) / len(shares), seconds)
    with open(ROOT / "docs" / "data" / f"compensation_{Path(args.base).name}.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


main()
