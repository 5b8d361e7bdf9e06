"""The accelerator path on an accelerator: is it right, the same twice, as large as planned, and how fast beside its ceilings.

    right       the grouped kernel on the device against the slow reference in float64: output and gradients, relative error
    twice       a client's step taken twice from one state: loss and gradients bit for bit
    ceilings    a copy in GB/s and a matrix product in TFLOP/s, of this device, in this run
    experts     one layer's experts, forward and backward: TFLOP/s, the share of the ceiling, launches of a pass
    steps       a client's step in turns with transformers + PEFT and its grouped products, at K = 8, 2, 1
    memory      what a step adds at its peak, beside what plan says (with the steps, on a GPU)

Shapes are OLMoE-1B-7B's, with random weights made on the device: sixteen layers in bfloat16, 4,096 tokens. No part begins when
six of the eight minutes that it may take are over; a part that was left out is named.

    python bench/gpu.py [--device cuda] [--out FILE]
    python bench/gpu.py --device cpu --quick      the same lines at small shapes: is the script whole
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import OlmoeConfig, OlmoeForCausalLM

from ubsmoe.client.train import language_loss
from ubsmoe.costs.memory import peak_memory_bytes
from ubsmoe.costs.workload import Batch, Workload
from ubsmoe.model import kernel_choice
from ubsmoe.model.conventions import find_blocks
from ubsmoe.model.expert_weights import ExpertWeights, Lora
from ubsmoe.model.kernel_grouped import run_grouped
from ubsmoe.model.kernel_reference import run_assignments_slowly
from ubsmoe.model.presets import shape_from_config
from ubsmoe.model.surgery import SparseModel

RESULTS = Path(__file__).parent / "results"
SEED, RANK, LAST_START_SECONDS = 0, 8, 360
ERROR = {torch.float32: 1e-4, torch.bfloat16: 3e-2}  # what is still called right: relative, against float64
Step = Callable[[], Tensor]


@dataclass(frozen=True)
class Scale:
    """What is measured: how many layers, how wide, how many tokens."""

    device: torch.device
    layers: int = 16
    hidden: int = 2048
    width: int = 1024
    experts: int = 64
    vocab: int = 50304
    rows: int = 32
    length: int = 128
    repeats: int = 10
    product: int = 8192

    @classmethod
    def quick(cls, device: torch.device) -> "Scale":
        """Seconds on a CPU."""
        return cls(device, 2, 64, 32, 16, 512, 2, 24, 2, 256)

    def config(self, layers: int) -> OlmoeConfig:
        """OLMoE-1B-7B's, but for these sizes."""
        return OlmoeConfig(
            vocab_size=self.vocab,
            hidden_size=self.hidden,
            intermediate_size=self.width,
            num_hidden_layers=layers,
            num_attention_heads=16,
            num_key_value_heads=16,
            num_experts=self.experts,
            num_experts_per_tok=8,
            max_position_embeddings=4096,
            pad_token_id=1,
            eos_token_id=0,
        )

    def base(self, layers: int, dtype: torch.dtype = torch.bfloat16) -> OlmoeForCausalLM:
        """Random weights, made where they stay; norms are ones."""
        with torch.device("meta"):
            model = OlmoeForCausalLM(self.config(layers)).to(dtype).eval()
        model.to_empty(device=self.device)
        generator = torch.Generator(self.device).manual_seed(SEED)
        for name, weight in model.named_parameters():
            weight.requires_grad_(False)
            weight.fill_(1) if "norm" in name else weight.normal_(0, weight.shape[-1] ** -0.5, generator=generator)
        # its frequencies are computed, not weights
        model.model.rotary_emb = type(model.model.rotary_emb)(self.config(layers)).to(self.device)
        return model

    def batch(self) -> dict[str, Tensor]:
        """Random tokens, a label everywhere."""
        generator = torch.Generator(self.device).manual_seed(SEED)
        ids = torch.randint(0, self.vocab, (self.rows, self.length), device=self.device, generator=generator)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}

    def wait(self) -> None:
        """Until the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def seconds(self, act: Callable[[], Any]) -> list[float]:
        """Of each repetition, after one that is not counted."""
        found = []
        for _ in range(self.repeats + 1):
            self.wait()
            began = time.perf_counter()
            act()
            self.wait()
            found.append(time.perf_counter() - began)
        return found[1:]


class Launches(TorchDispatchMode):
    """Counts torch's operators but for views."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.namespace == "aten" and not func.is_view
        return func(*args, **(kwargs or {}))


def one_layer(scale: Scale, top_k: int, dtype: torch.dtype) -> tuple[list[Tensor], Callable[..., Tensor]]:
    """Leaves (hidden states, gate weights, factors), and the layer as a function of a kernel and them."""
    _, module = next(find_blocks(scale.base(1, dtype)))
    base, generator = ExpertWeights.of(module), torch.Generator(scale.device).manual_seed(SEED)
    tokens = scale.rows * scale.length

    def normal(*shape: int, of: torch.dtype = dtype) -> Tensor:
        values = torch.randn(shape, generator=generator, device=scale.device, dtype=torch.float32)
        return (values / shape[-1] ** 0.5).to(of).requires_grad_()

    scores = torch.rand(tokens, scale.experts, generator=generator, device=scale.device)
    choice = scores.topk(top_k, dim=-1)
    token = torch.arange(tokens, device=scale.device).repeat_interleave(top_k)
    expert, weight = choice.indices.reshape(-1), choice.values.reshape(-1).to(dtype).requires_grad_()
    h, f, m = scale.hidden, scale.width, scale.experts
    factors = [normal(m, *shape, of=torch.float32) for shape in ((RANK, h), (2 * f, RANK), (RANK, f), (h, RANK))]

    def run(kernel: Any, leaves: list[Tensor], weights: ExpertWeights = base) -> Tensor:
        y: Tensor = kernel(leaves[0], token, expert, leaves[1], weights, Lora(*leaves[2:], scale=2.0))
        return y

    return [normal(tokens, h), weight, *factors], run


def right(scale: Scale) -> dict[str, Any]:
    """Relative errors by dtype, the largest of output and gradients."""
    found = {}
    for dtype, most in ERROR.items():
        leaves, run = one_layer(scale, 2, dtype)
        wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
        base = run.__defaults__[0]  # type: ignore[attr-defined]
        exact = ExpertWeights(base.up.double(), base.down.double(), None, None, base.activation, base.is_swiglu)
        with torch.enable_grad():
            ours, want = run(run_grouped, leaves), run(run_assignments_slowly, wide, exact)
            delta = torch.ones_like(want) / want.numel() ** 0.5
            pairs = zip(
                [ours, *torch.autograd.grad(ours, leaves, delta.to(dtype))],
                [want, *torch.autograd.grad(want, wide, delta)],
                strict=True,
            )
            errors = [float((one.double() - other).detach().norm() / other.detach().norm()) for one, other in pairs]
        found[str(dtype)] = {"error": max(errors), "at_most": most, "holds": max(errors) <= most}
    return found


def our_step(scale: Scale, top_k: int) -> tuple[Step, SparseModel]:
    """A client's step but for the optimiser's part."""
    sparse, batch = SparseModel(scale.base(scale.layers)), scale.batch()
    sparse.load_adapter(sparse.fresh_adapter(RANK, torch.Generator().manual_seed(SEED), shared_a=True), alpha=16.0)
    sparse.set_top_k(top_k)

    def step() -> Tensor:
        for value in sparse.adapter.values():
            value.grad = None
        with sparse.counting():
            loss = language_loss(sparse, batch)
            loss.backward()
        return loss.detach()

    return step, sparse


def peft_step(scale: Scale, top_k: int) -> Step:
    """The same by transformers with grouped products and PEFT on the expert tensors."""
    from peft import LoraConfig, get_peft_model

    model, batch = scale.base(scale.layers), scale.batch()
    model.set_experts_implementation("grouped_mm")
    for router, _ in find_blocks(model):
        router.top_k = top_k  # type: ignore[assignment]
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    tuned = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=16, target_modules=[], target_parameters=targets))
    trained = [weight for weight in tuned.parameters() if weight.requires_grad]

    def step() -> Tensor:
        for weight in trained:
            weight.grad = None
        loss: Tensor = tuned(**batch, use_cache=False).loss
        loss.backward()
        return loss.detach()

    return step


def twice(scale: Scale) -> dict[str, Any]:
    """Whether two steps from one state have the same loss and the same gradients, bit for bit."""
    step, sparse = our_step(scale, 2)

    def taken() -> list[Tensor]:
        return [step(), *(value.grad.clone() for value in sparse.adapter.values() if value.grad is not None)]

    return {"same_bits": all(torch.equal(one, other) for one, other in zip(taken(), taken(), strict=True))}


def ceilings(scale: Scale) -> dict[str, Any]:
    """What the device does at best, here and now."""
    n = scale.product
    a, b = (torch.randn(n, n, device=scale.device).bfloat16() for _ in range(2))
    product, copy = scale.seconds(lambda: a @ b), scale.seconds(lambda: b.copy_(a))
    return {
        "tflops": 2 * n**3 / statistics.median(product) / 1e12,
        "gb_per_second": 2 * a.nbytes / statistics.median(copy) / 1e9,
    }


def experts(scale: Scale, ceiling: float) -> dict[str, Any]:
    """Of one layer at each K."""
    found = {}
    for top_k in (8, 2, 1):
        leaves, run = one_layer(scale, top_k, torch.bfloat16)
        delta = torch.ones_like(leaves[0])

        def both(leaves: list[Tensor] = leaves, run: Any = run, delta: Tensor = delta) -> None:
            torch.autograd.grad(run(run_grouped, leaves), leaves, delta)

        seconds = statistics.median(scale.seconds(both))
        with Launches() as launches:
            both()
        # forward and the gradient by the inputs; of the adapter also the gradient by its factors
        pairs, h, f = len(leaves[1]), scale.hidden, scale.width
        flops = pairs * (4 * 3 * h * f + 6 * RANK * (2 * h + 3 * f))
        rate = flops / seconds / 1e12
        found[top_k] = {"ms": seconds * 1e3, "tflops": rate, "of_ceiling": rate / ceiling, "launches": launches.count}
    return found


def steps(scale: Scale, top_k: int) -> dict[str, Any]:
    """Milliseconds of a step in turns, and on a GPU the memory that ours adds to the weights."""
    shape = shape_from_config(scale.config(scale.layers))
    planned = peak_memory_bytes(shape, top_k, Workload(RANK, Batch.full(scale.rows, scale.length), dtype_bytes=2))
    found: dict[str, Any] = {}
    ours, _ = our_step(scale, top_k)
    if scale.device.type == "cuda":
        ours()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        ours()
        found["added_bytes"] = torch.cuda.max_memory_allocated() - before
        found["planned_bytes"] = planned.gradients + planned.activations + planned.working
    ways = {"ours": ours, "peft": peft_step(scale, top_k)}
    times: dict[str, list[float]] = {way: [] for way in ways}
    for turn in range(scale.repeats + 1):
        for way, step in ways.items():
            scale.wait()
            began = time.perf_counter()
            step()
            scale.wait()
            if turn:
                times[way].append((time.perf_counter() - began) * 1e3)
    for way, values in times.items():
        q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
        found[way] = {"median_ms": median, "q1": q1, "q3": q3}
    found["peft_over_ours"] = found["peft"]["median_ms"] / found["ours"]["median_ms"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="small shapes")
    parser.add_argument("--out", type=Path, help="default: bench/results/gpu-CARD.json; with --quick nothing is kept")
    options = parser.parse_args()
    device = torch.device(options.device)
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu"
    scale = Scale.quick(device) if options.quick else Scale(device)
    kernel_choice.GROUPED_ON.add(device.type)
    began, record = (
        time.perf_counter(),
        {"card": card, "torch": torch.__version__, "quick": options.quick, "seed": SEED},
    )
    parts: dict[str, Callable[[], Any]] = {
        "right": lambda: right(scale),
        "twice": lambda: twice(scale),
        "ceilings": lambda: ceilings(scale),
        "experts": lambda: experts(scale, record["ceilings"]["tflops"]),
        **{f"step K={top_k}": lambda top_k=top_k: steps(scale, top_k) for top_k in (2, 1, 8)},
    }
    out = options.out or (None if options.quick else RESULTS / f"gpu-{card.replace(' ', '-')}.json")
    for name, part in parts.items():
        if time.perf_counter() - began > LAST_START_SECONDS:
            record[name] = "left out: no time"
        else:
            try:
                record[name] = part()
            except torch.OutOfMemoryError as error:
                record[name] = f"left out: {error}"
        if device.type == "cuda":
            torch.cuda.empty_cache()
        print(f"{name:>10}  {json.dumps(record[name])}", flush=True)
        if out:
            out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
