"""What stands for skipped experts, before any training: loss and accuracy of a base at every K, by form, rank and text to fit on.

    share          of the loss gap from K (as tiers.rescale has it) to K_max that the form closes
    explained      of the missing sum's square, mean over layers
    flops, flops_olmoe   extra FLOPs of a training step at this K, in percent: of this base, of OLMoE-1B-7B's shape

python bench/compensation.py BASE [--tokens 4096] [--questions 320] [--records FILE]
prints a table, writes docs/data/compensation_{name}.csv

Questions are of the world that our own bases were pretrained on. Another base has --records: the loss is that of whole texts, in
nats per token, on the file's last `questions` records, and `known` are its first ones. There is no accuracy then.
"""

import argparse
import csv
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ubsmoe.client.train import language_loss
from ubsmoe.config import parse_run
from ubsmoe.costs.compensation import Skipped
from ubsmoe.costs.flops import batch_flops
from ubsmoe.costs.shape import ModelShape
from ubsmoe.data.records import read_file
from ubsmoe.data.synthetic import SyntheticQA
from ubsmoe.data.tasks import Example
from ubsmoe.data.tokens import Tokens, collate, pad_id, tokenize
from ubsmoe.methods.method import install_adapter
from ubsmoe.model.compensation_fit import FormSettings, fit_compensation
from ubsmoe.model.presets import model_shape, shape_from_config
from ubsmoe.model.surgery import SparseModel
from ubsmoe.plan.tiers import run_workload
from ubsmoe.server.calibration import in_one_batch, written_by_base
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
    FormSettings(form="none", slices=2),
    FormSettings(form="map", rank=64, slices=2),
    FormSettings(form="map", rank=64, slices=4),
]
RECORD_FORMS = [
    FormSettings(form="none"),
    FormSettings(form="constant"),
    FormSettings(form="elementwise"),
    FormSettings(form="stand_ins", rank=64),
    FormSettings(form="map", rank=64),
    FormSettings(form="map", rank=256),
    FormSettings(form="map", rank=64, slices=2),
    FormSettings(form="stand_ins", rank=256),
]


def known_text(records: Path | None, tokenizer: Any, fit_on: int, asked: int) -> tuple[list[Example], list[Example]]:
    """Examples to fit on, and others to ask."""
    if records is None:
        known = SyntheticQA(0, 48, "pretraining")
        return known.examples("train", fit_on, seed=2), known.examples("test", asked, seed=1)
    examples = read_file(records, tokenizer)
    return examples[:fit_on], examples[-asked:]


@torch.no_grad()
def text_loss(model: SparseModel, texts: Sequence[Tokens], pad: int) -> float:
    """Nats per token of whole texts."""
    total, count = 0.0, 0
    for start in range(0, len(texts), 16):
        batch = collate(list(texts[start : start + 16]), pad, loss_on_prompt=True)
        tokens = int((batch["labels"][:, 1:] >= 0).sum())
        total, count = total + float(language_loss(model, batch)) * tokens, count + tokens
    return total / count


def main() -> None:
    """Measure one base."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--questions", type=int, default=320)
    parser.add_argument("--records", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    source: dict[str, Any] = {
        "data": {"train": "synthetic"},
        "tiers": {"budgets": [0.125, 0.25, 0.5, 1.0], "ranks": [4, 8, 16, 32]},
    }
    if args.records:
        source = {
            "data": {"train": str(args.records), "loss_on_prompt": True, "max_length": 224},
            "tiers": {"budgets": [0.25, 0.5, 0.75, 1.0]},
        }
    settings = parse_run({"model": {"base": args.base}, "evaluate": {"max_new_tokens": 8}, **source})
    server = build_server(settings, weights=True)
    model, tokenizer, forms = server.model, server.tokenizer, RECORD_FORMS if args.records else FORMS
    own, olmoe = shape_from_config(model.model.config), model_shape("olmoe-1b-7b")
    fit_on, asked = known_text(args.records, tokenizer, args.tokens // 24, args.questions)
    questions = prepare({"known": asked}, tokenizer, settings.data, settings.evaluate)
    held_out = tokenize(asked, tokenizer, settings.data, "test")
    texts = {
        "base": written_by_base(model, tokenizer, settings, args.tokens),
        "known": tokenize(fit_on, tokenizer, settings.data, "train"),
    }
    adapter, top_ks = start_state(server).adapters, [profile.top_k for profile in server.tiers]
    rows: list[dict[str, Any]] = []

    def extra(shape: ModelShape, top_k: int, form: FormSettings) -> float:
        work = run_workload(settings)
        skipped = Skipped(form.form, form.rank, form.slices, shape.k_max)
        return 100 * (batch_flops(shape, top_k, replace(work, skipped=skipped)) / batch_flops(shape, top_k, work) - 1)

    def score(name: str, text: str, top_k: int, form: FormSettings | None = None, **more: float) -> None:
        if args.records:
            loss, accuracy = text_loss(model, held_out, pad_id(tokenizer)), None
        else:
            found = evaluate(model, tokenizer, questions, settings.evaluate)["macro"]
            loss, accuracy = found.loss, round(found.accuracy, 4)
        plain = {row["top_k"]: row["loss"] for row in rows if row["form"] == "today"}
        gap = plain.get(top_k, 0) - plain.get(model.k_max, 0)
        rows.append(
            {
                "form": name,
                "text": text,
                "top_k": top_k,
                "loss": round(loss, 4),
                "accuracy": accuracy,
                "share": round((plain[top_k] - loss) / gap, 3) if form and gap else "",
                **{key: round(value, 3) for key, value in more.items()},
                "flops": round(extra(own, top_k, form), 2) if form else 0.0,
                "flops_olmoe": round(extra(olmoe, top_k, form), 2) if form else 0.0,
            }
        )
        print("  ".join(f"{value}" for value in rows[-1].values()), flush=True)

    for profile in server.tiers:
        install_adapter(model, adapter, profile, settings.adapter.alpha)
        score("today", "", profile.top_k, explained=0.0, fit_seconds=0.0)
    for text, written in texts.items():
        batch = in_one_batch(written, pad_id(tokenizer))
        print(text, sum(len(one.input_ids) for one in written), "tokens", flush=True)
        for form in forms if text == "base" else forms[-2:]:
            began = time.process_time()
            fitted = fit_compensation(model, batch, top_ks, form)
            seconds = time.process_time() - began
            for top_k in top_ks[:-1]:
                model.set_top_k(top_k)
                shares = fitted.explained[top_k]
                name = f"{form.form} r={form.rank} n={form.slices}"
                score(name, text, top_k, form, explained=sum(shares) / len(shares), fit_seconds=seconds)
    with open(ROOT / "docs" / "data" / f"compensation_{Path(args.base).name}.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


main()
