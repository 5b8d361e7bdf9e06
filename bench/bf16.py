"""bfloat16 against float32: 200 steps of one client from the same adapter on the same batches, in turns, and what a step costs.

The shipped base learns a world that it has not seen, K = 8, batches of 8, AdamW, LoRA in float32 either way. Loss of both, step by
step; their difference is rounding, grown by training. Times are CPU time of one thread, of the same pairs of steps.

The promise of 1.5 times needs a processor with bfloat16 matrix units (AMX); the JSON says whether this one has them.

python bench/bf16.py [--quick] [--out FILE] [--figures DIR]    about two minutes; --quick takes ten steps
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib
import torch

from ubsmoe.client.allocator import keep_freed_memory
from ubsmoe.client.train import language_loss
from ubsmoe.config import RunSettings, parse_run
from ubsmoe.data.sources import load_training
from ubsmoe.data.tokens import batches, collate, pad_id, tokenize
from ubsmoe.model.load import load_base, load_tokenizer
from ubsmoe.report.figures import STYLE, look, panels, save

RESULT = Path(__file__).resolve().parent / "results" / "bf16.json"
SEED, STEPS, WARM_UP = 0, 200, 5
DTYPES = ("float32", "bfloat16")
SETTINGS = {
    "data": {"synthetic": {"seed": 1, "train_examples": 2000}},
    "train": {"batch_size": 8, "learning_rate": 3e-3},
}
Batch = dict[str, torch.Tensor]


def learner(settings: RunSettings, dtype: str) -> Callable[[Batch], float]:
    """A step of a client whose base is in `dtype`, as client.py takes it; gives the loss before the step."""
    model, _ = load_base(settings.model.model_copy(update={"dtype": dtype}), "none", None)
    adapter = model.fresh_adapter(settings.adapter.rank, torch.Generator().manual_seed(SEED), shared_a=True)
    model.load_adapter(adapter, settings.adapter.alpha)
    optimizer = torch.optim.AdamW(model.adapter.values(), settings.train.learning_rate, fused=True)

    def step(batch: Batch) -> float:
        optimizer.zero_grad()
        loss = language_loss(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.adapter.values(), 1.0)
        optimizer.step()
        return loss.item()

    return step


def world_batches(settings: RunSettings) -> Iterator[Batch]:
    tokenizer = load_tokenizer(settings.model)
    tokens = tokenize(load_training(settings.data, tokenizer, SEED), tokenizer, settings.data, "train")
    for chosen in batches(len(tokens), settings.train.batch_size, torch.Generator().manual_seed(SEED)):
        yield collate([tokens[i] for i in chosen], pad_id(tokenizer))


def draw(losses: dict[str, list[float]], folder: Path) -> list[Path]:
    """Both curves, one on the other, and their difference below."""
    with matplotlib.rc_context(STYLE):
        figure, (both, apart) = panels(2, (5.6, 4.2), columns=1)
        for index, dtype in enumerate(DTYPES):
            both.plot(losses[dtype], label=dtype, color=look(index)["color"], lw=1.6 - 0.8 * index)
        apart.plot([b - a for a, b in zip(*losses.values(), strict=True)], color=look(2)["color"], lw=1)
        both.set(ylabel="loss, nats per answer token", yscale="log")
        both.legend()
        apart.set(xlabel="step", ylabel="bfloat16 less float32")
        rows = [
            {"step": step, **dict(zip(DTYPES, pair, strict=True))}
            for step, pair in enumerate(zip(*losses.values(), strict=True))
        ]
        return save(figure, rows, folder / "bf16")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--figures", type=Path, default=Path("out/figures"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    settings = parse_run(SETTINGS)
    steps = {dtype: learner(settings, dtype) for dtype in DTYPES}
    losses: dict[str, list[float]] = {dtype: [] for dtype in DTYPES}
    times: dict[str, list[float]] = {dtype: [] for dtype in DTYPES}
    for _, batch in zip(range(10 if options.quick else STEPS), world_batches(settings), strict=False):
        for dtype, step in steps.items():
            began = time.process_time()
            losses[dtype].append(step(batch))
            times[dtype].append((time.process_time() - began) * 1e3)
    facts = summary(losses, times) | {"seed": SEED, "threads": 1, "torch": torch.__version__, "quick": options.quick}
    options.out.parent.mkdir(exist_ok=True)
    options.out.write_text(json.dumps(facts | {"losses": losses}) + "\n")
    for name, value in facts.items():
        print(f"{name:<22} {value}")
    print(*draw(losses, options.figures), sep="\n")


def summary(losses: dict[str, list[float]], times: dict[str, list[float]]) -> dict[str, Any]:
    """Differences of the losses, relative too, and the ratio of paired times with its quartiles."""
    one, other = losses.values()
    apart = [abs(b - a) for a, b in zip(one, other, strict=True)]
    ratios = [a / b for a, b in zip(*(taken[WARM_UP:] for taken in times.values()), strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {
        "largest_difference": max(apart),
        "mean_difference": statistics.fmean(apart),
        "last_quarter_losses": [statistics.fmean(values[-len(values) // 4 :]) for values in (one, other)],
        "float32_ms": statistics.median(times["float32"][WARM_UP:]),
        "speed_up": {"median": middle, "q1": low, "q3": high},
        "has_amx": "amx_bf16" in Path("/proc/cpuinfo").read_text(),
    }


if __name__ == "__main__":
    main()
