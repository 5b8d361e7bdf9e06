"""A client that leaves whole experts out of memory: loss and accuracy of a base, before any training, by the share that it holds.

It holds the experts of each layer that its calibration text used most, and every token goes to the best K of those. With `map`, a
compensation stands for what K leaves out of the K_max best that are held; nothing stands for experts that are not.

python bench/expert_subset.py BASE [--questions 160]     seed 0, one thread; prints a table
"""

import argparse
from dataclasses import replace

import torch

from ubsmoe.config import parse_run
from ubsmoe.data.synthetic import SyntheticQA
from ubsmoe.data.tokens import pad_id
from ubsmoe.methods.method import install_adapter
from ubsmoe.model.compensation_fit import FormSettings, fit_compensation
from ubsmoe.server.calibration import in_one_batch, written_by_base
from ubsmoe.server.evaluate import evaluate, prepare
from ubsmoe.server.federation import build_server
from ubsmoe.server.start import start_state

SHARES = (1.0, 0.75, 0.5, 0.25)


def main() -> None:
    """Measure one base."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base")
    parser.add_argument("--questions", type=int, default=160)
    args = parser.parse_args()
    torch.set_num_threads(1)
    settings = parse_run(
        {
            "model": {"base": args.base},
            "evaluate": {"max_new_tokens": 8, "mc_accuracy": False},
            "tiers": {"budgets": [0.125, 0.25, 0.5, 1.0]},
        }
    )
    server = build_server(settings, weights=True)
    model, known = server.model, SyntheticQA(0, 48, "pretraining")
    asked = {"known": known.examples("test", args.questions, seed=1)}
    questions = prepare(asked, server.tokenizer, settings.data, settings.evaluate)
    text = in_one_batch(written_by_base(model, server.tokenizer, settings, 4096), pad_id(server.tokenizer))
    install_adapter(model, start_state(server).adapters, server.tiers[-1], settings.adapter.alpha)
    with model.counting(), torch.no_grad():
        for batch in batches:
            model.model(**batch, use_cache=False)
    used = model.expert_tokens()
    top_ks = [profile.top_k for profile in server.tiers]
    for share in SHARES:
        held = used.argsort(dim=1, descending=True)[:, : round(share * model.num_experts)]
        model.set_selection_bias(torch.full(used.shape, -1e4).scatter(1, held, 0.0))
        for form in ("without", "map"):
            for layer in model.layers:
                layer.routing = replace(layer.routing, compensation=None)
            if form == "map":
                fit_compensation(model, text, top_ks, FormSettings(form="map", rank=64))
            for top_k in top_ks if form == "without" else top_ks[:-1]:
                model.set_top_k(top_k)
                found = evaluate(model, server.tokenizer, questions, settings.evaluate)["macro"]
                mass = float(used.gather(1, held).sum() / used.sum())
                print(
                    f"{share:.2f}  use {mass:.2f}  K={top_k}  {form:<8} {found.loss:.4f}  {found.accuracy:.3f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
