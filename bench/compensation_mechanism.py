"""What a compensation does inside a base: the share of the missing sum that it explains, and where its gradient points.

    explained   1 - || missing - C ||^2 / || missing ||^2 per layer, on questions that nothing was fitted on, of the reduced
                model's own inputs
    cosine      between d loss / d (input of a layer's experts) at K and at K_max, all tokens of a batch as one vector, per layer

Before training: every form, fitted on text that the base wrote. After it: the adapter of a finished run, with the maps that the run
ended with ("as trained with") and with every form fitted again ("fitted again"). `plain` has nothing in place (tiers.rescale).

python bench/compensation_mechanism.py BASE [--runs RUN ...] [--top-k 1] [--questions 96] [--tokens 4096]
prints a table, writes bench/results/compensation_mechanism.json
"""

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ubsmoe.client.train import language_loss
from ubsmoe.config import parse_run
from ubsmoe.data.synthetic import SyntheticQA
from ubsmoe.data.tokens import collate, pad_id, tokenize
from ubsmoe.finished.run import open_run
from ubsmoe.methods.compensation import CompensationState
from ubsmoe.methods.method import install_adapter
from ubsmoe.model.compensation_fit import FormSettings, fit_compensation, missing_sum
from ubsmoe.model.layer import SparseLayer
from ubsmoe.model.routing import Passing
from ubsmoe.model.surgery import SparseModel
from ubsmoe.server.calibration import in_one_batch, written_by_base
from ubsmoe.server.federation import build_server
from ubsmoe.server.start import start_state

RESULT = Path(__file__).resolve().parent / "results" / "compensation_mechanism.json"
FORMS = {
    "none": FormSettings(form="none"),
    "constant": FormSettings(form="constant"),
    "elementwise": FormSettings(form="elementwise"),
    "map": FormSettings(),
    "map, two slices": FormSettings(slices=2),
    "stand-ins": FormSettings(form="stand_ins"),
}
Batch = dict[str, Tensor]


@contextmanager
def seeing(model: SparseModel, kept: list[list[Passing]]) -> Iterator[None]:
    """What passes through every layer of a forward pass, kept."""
    before = [layer.routing for layer in model.layers]

    def watch(layer: SparseLayer) -> None:
        layer.routing = replace(layer.routing, probe=kept[layer.index].append)

    for layer in model.layers:
        watch(layer)
    try:
        yield
    finally:
        for layer, routing in zip(model.layers, before, strict=True):
            layer.routing = routing


@torch.no_grad()
def explained(model: SparseModel, batches: Sequence[Batch], top_k: int) -> list[float]:
    """Of the missing sum's square, per layer."""
    model.set_top_k(top_k)
    left, whole = torch.zeros(len(model.layers)), torch.zeros(len(model.layers))
    for batch in batches:
        kept: list[list[Passing]] = [[] for _ in model.layers]
        with seeing(model, kept):
            model.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
        for layer, (seen,) in zip(model.layers, kept, strict=True):
            missing, own = missing_sum(layer, seen), layer.routing.compensation
            form = own.at(top_k) if own else None
            found = form(seen.hidden, seen.skipped) if form else torch.zeros_like(missing)
            left[layer.index] += (missing - found).square().sum()
            whole[layer.index] += missing.square().sum()
    return torch.where(
        whole > 0, 1 - left / whole, 0.0
    ).tolist()  # without a compensation nothing is known to be missing


def gradients(model: SparseModel, batches: Sequence[Batch], top_k: int) -> list[Tensor]:
    """d loss / d input of every layer's experts, batch after batch, as one vector per layer."""
    model.set_top_k(top_k)
    found: list[list[Tensor]] = [[] for _ in model.layers]
    for batch in batches:
        inputs: list[Tensor] = []
        keep = partial(_keep_input, inputs)
        hooks = [layer.experts.register_forward_pre_hook(keep) for layer in model.layers]
        loss = language_loss(model, batch)
        for hook in hooks:
            hook.remove()
        for own, grad in zip(found, torch.autograd.grad(loss, inputs), strict=True):
            own.append(grad.flatten())
    return [torch.cat(own) for own in found]


def _keep_input(inputs: list[Tensor], module: torch.nn.Module, given: tuple[Tensor, ...]) -> None:
    inputs.append(given[0])


def cosines(one: Sequence[Tensor], other: Sequence[Tensor]) -> list[float]:
    return [float(torch.nn.functional.cosine_similarity(a, b, dim=0)) for a, b in zip(one, other, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base")
    parser.add_argument("--runs", nargs="*", type=Path, default=[])
    parser.add_argument("--top-k", type=int, default=1)
    parser.add_argument("--questions", type=int, default=96)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    torch.set_num_threads(1)
    settings = parse_run({"model": {"base": args.base}, "data": {"train": "synthetic"}})
    server = build_server(settings, weights=True)
    text = in_one_batch(
        written_by_base(server.model, server.tokenizer, settings, args.tokens), pad_id(server.tokenizer)
    )
    asked = tokenize(
        SyntheticQA(0, 48, "pretraining").examples("test", args.questions, seed=1),
        server.tokenizer,
        settings.data,
        "test",
    )
    rows: list[dict[str, Any]] = []

    def batches(tokens: Sequence[Any]) -> list[Batch]:
        return [collate(list(tokens[i : i + 32]), pad_id(server.tokenizer)) for i in range(0, len(tokens), 32)]

    def record(model: SparseModel, when: str, form: str, questions: Sequence[Batch], whole: Sequence[Tensor]) -> None:
        share = explained(model, questions, args.top_k)
        aligned = cosines(gradients(model, questions, args.top_k), whole)
        rows.append({"when": when, "form": form, "top_k": args.top_k, "explained": share, "cosine": aligned})
        print(
            when,
            form,
            *(f"{value:.3f}" for value in share),
            "|",
            *(f"{value:.3f}" for value in aligned),
            sep="  ",
            flush=True,
        )

    def forms(
        model: SparseModel, when: str, questions: Sequence[Batch], ended: Mapping[str, Tensor] | None = None
    ) -> None:
        model.model.get_input_embeddings().weight.requires_grad_()  # so that the lowest layer's input has a gradient
        whole = gradients(model, questions, model.k_max)
        for layer in model.layers:
            layer.routing = replace(layer.routing, compensation=None)
        record(model, when, "plain", questions, whole)
        if ended:
            model.set_compensation(ended)
            record(model, f"{when}, as trained with", "of the run", questions, whole)
        for name, form in FORMS.items():
            fit_compensation(model, text, [args.top_k], form)
            record(model, f"{when}, fitted again" if ended else when, name, questions, whole)

    model = server.model
    install_adapter(model, start_state(server).adapters, server.tiers[-1], settings.adapter.alpha)
    forms(model, "before", batches(asked))
    for folder in args.runs:
        run = open_run(folder)
        trained = run.install(run.tier(None))
        own = run.state.of(CompensationState).by_name() if CompensationState in run.method.keeps else None
        forms(trained, f"after {run.settings.label or run.method.name}", batches(asked), own)
    args.out.write_text(json.dumps(rows, indent=1) + "\n")


main()
