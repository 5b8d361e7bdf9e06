"""`ubsmoe plan` against reality: 14 runs, estimated from their settings, then carried out.

    FLOPs   torch's FlopCounterMode around one client's round (`ubsmoe.client.train.train`, batches of 3), against the tier's FLOPs
    memory  a fresh process trains a client of a tiny base of the same family, so that the libraries hold what they will: code
            that is paged in at its first use, the products' buffers. What is resident then is the runtime, against
            RUNTIME_BYTES. It then builds the run, resets the kernel's peak-RSS mark, trains that client for a round: what the
            peak lies above the resident memory before, plus the base's weights, against the tier's memory. glibc is told to
            give freed memory back at once, so that what counts is what is held
    bytes   the `client` events of a round of the whole run: down equal or not. Up, the plan is for an update that touched
            every expert; less what stayed at home (counted from the tensors), equal or not; and as a share of the plan's
    seconds of that client's round, over the seconds estimated: how far products of expert size are from the whole step

Each base is random, OLMoE- or Mixtral- or Qwen3-shaped, small, but large enough that tensors dominate. Seed 0, Linux only.

    python bench/plan.py            all of them
    python bench/plan.py --quick    the first three
"""

import argparse
import gc
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "plan.json"
AT_ONCE = {"MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
OLMOE: dict[str, Any] = {
    "model_type": "olmoe", "hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 4, "num_experts": 16, "num_experts_per_tok": 8,
}  # fmt: skip
QWEN: dict[str, Any] = {
    "model_type": "qwen3_moe", "hidden_size": 192, "moe_intermediate_size": 320, "num_hidden_layers": 4, "head_dim": 48,
    "num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 24, "num_experts_per_tok": 8, "intermediate_size": 64,
    "decoder_sparse_step": 1, "mlp_only_layers": [],
}  # fmt: skip
MIXTRAL: dict[str, Any] = {
    "model_type": "mixtral", "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_local_experts": 8, "num_experts_per_tok": 2,
}  # fmt: skip
TINY = {"hidden_size": 32, "intermediate_size": 32, "moe_intermediate_size": 32, "head_dim": 8}
# name, base, settings, the tier (from 0) that is carried out
CASES: list[tuple[str, dict[str, Any], dict[str, Any], int]] = [
    ("olmoe, K = 8", OLMOE, {}, 3),
    ("olmoe, K = 2", OLMOE, {}, 0),
    ("olmoe, K = 4, rank 32", OLMOE, {"adapter.rank": 32}, 1),
    ("olmoe, K = 8, accumulation 2", OLMOE, {"train.gradient_accumulation": 2, "train.batch_size": 16}, 3),
    ("olmoe, K = 6, router trained, SGD", OLMOE, {"adapter.router": "trained", "train.optimizer": "sgd"}, 2),
    ("olmoe, K = 4, sampled pseudo-gradient", OLMOE, {"method.name": "ubsmoe", "method.pg.mode": "sampled"}, 1),
    ("olmoe, hetlora, rank 4", OLMOE, {"method.name": "hetlora"}, 0),
    ("olmoe, K = 8, half the steps at K = 1", OLMOE, {"tiers.elastic_share": 0.5}, 3),
    ("olmoe, K = 8, loss on the whole text", OLMOE, {"data.loss_on_prompt": True}, 3),
    ("qwen3, K = 4", QWEN, {}, 1),
    ("mixtral, K = 1", MIXTRAL, {}, 1),
    ("qwen3, K = 8, batches of 8", QWEN, {"train.batch_size": 8}, 3),
    ("olmoe, K = 4, attention trained", OLMOE, {"adapter.attention": "trained"}, 1),
    ("olmoe, K = 8, gradient checkpointing", OLMOE, {"train.gradient_checkpointing": True}, 3),
    ("olmoe, K = 4, micro-batches of 6", OLMOE, {"train.micro_batch": 6, "train.local_steps": 2}, 1),
    ("olmoe, K = 4, flora, last round", OLMOE, {"method.name": "flora", "tiers.ranks": [8, 8, 8, 8]}, 1),
    ("olmoe, K = 4, fedex_lora, last round", OLMOE, {"method.name": "fedex_lora", "tiers.ranks": [8, 8, 8, 8]}, 1),
]


def settings_of(base: Path, changes: dict[str, Any]) -> Any:
    from ubsmoe.config import parse_run, with_overrides

    table = {
        "threads": 1,
        "model": {"base": str(base)},
        "clients": {"count": 4},
        # a client has one batch: the largest it may meet, which is what memory is estimated for, is the one it trains on
        "data": {"synthetic": {"train_examples": 4 * changes.get("train.batch_size", 24), "test_examples": 8}},
        "method": {"name": "fedavg"},
        "train": {"rounds": 2, "local_steps": 2, "batch_size": 24},
        "evaluate": {"max_new_tokens": 1, "max_examples": 1, "mc_accuracy": False},
    }
    return parse_run(with_overrides(table, changes))


def make_base(config: dict[str, Any], folder: Path) -> Path:
    """A random base with the shipped tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from ubsmoe.model.load import shipped_path

    tokenizer = AutoTokenizer.from_pretrained(shipped_path("ubsmoe-tiny"))
    torch.manual_seed(0)
    ends = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    shaped = AutoConfig.for_model(**config, **ends, vocab_size=len(tokenizer), max_position_embeddings=512)
    AutoModelForCausalLM.from_config(shaped).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def first_task(settings: Any, tier: int) -> Any:
    """The run, and the task of the tier's first client in round 1."""
    import torch

    from ubsmoe.messages import Task
    from ubsmoe.server.federation import build_federation
    from ubsmoe.server.start import start_state

    federation = build_federation(settings)
    profile = next(client for client in federation.clients if client.tier == tier)
    payload = federation.method.dispatch(start_state(federation), profile)
    most = federation.shape.side_rank or 0
    for name, value in payload.items():  # a side factor as it is in the last round
        if name.startswith("side."):
            a = name.endswith(".A")
            size = (len(value), most, value.shape[2]) if a else (*value.shape[:2], most)
            payload[name] = torch.randn(size, generator=torch.Generator().manual_seed(0)) / 100
    return federation, Task(1, profile, payload)


def measure_memory(settings: Any, tiny: Any, tier: int) -> dict[str, float]:
    """In a process of its own: bytes of the peak above what was resident before, plus the weights."""
    from ubsmoe.client.train import train

    # what the libraries page in and allot at their first step is theirs, not the model's
    federation, task = first_task(tiny, tier)
    train(federation.trainer, task, federation.examples[task.profile.client])
    del federation, task
    gc.collect()
    runtime = resident("VmRSS")
    federation, task = first_task(settings, tier)
    weights = sum(p.numel() * p.element_size() for p in federation.model.model.parameters())
    payload = sum(tensor.numel() * tensor.element_size() for tensor in task.payload.values())
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    began = time.perf_counter()
    train(federation.trainer, task, federation.examples[task.profile.client])
    seconds = time.perf_counter() - began
    # the task was there before: it belongs to the client as the weights do
    return {
        "memory_bytes": resident("VmHWM") - before + weights + payload,
        "runtime_bytes": runtime,
        "seconds": seconds,
    }


def resident(which: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(which))
    return 1024 * int(line.split()[1])


def count_flops(settings: Any, tier: int) -> int:
    """What torch counts in that client's round."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

    from ubsmoe.client.train import train

    # torch's counter lacks the product in place and the processor's own attention; all get shapes
    aten = torch.ops.aten
    missing = {
        aten.addmm_: lambda out, a, b, **_: 2 * a[0] * a[1] * b[1],
        aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda grad, q, k, v, *_, **__: (
            sdpa_backward_flop_count(grad, q, k, v)
        ),
    }
    federation, task = first_task(settings, tier)
    with FlopCounterMode(display=False, custom_mapping=missing) as counter:
        train(federation.trainer, task, federation.examples[task.profile.client])
    return int(counter.get_total_flops())


def run_events(settings: Any, folder: Path) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """The `client` events of the second round, and the bytes that each of its clients kept at home."""
    from ubsmoe.config import to_json
    from ubsmoe.engines.local import LocalEngine
    from ubsmoe.server.federation import build_federation
    from ubsmoe.server.run import run
    from ubsmoe.storage.events import read_events
    from ubsmoe.storage.runfolder import RunFolder

    federation = build_federation(settings)
    clients = LocalEngine(federation.trainer, federation.examples, federation.clients)
    kept: dict[str, int] = {}

    class Watched:
        def clients(self) -> Any:
            return clients.clients()

        def exchange(self, tasks: Any) -> Any:
            for task in tasks:
                for update in clients.exchange([task]):
                    kept[update.client] = stayed_home(update.adapters, task.payload)
                    yield update

    with RunFolder.open_or_create(folder, to_json(settings)) as place:
        run(federation, place, Watched(), lambda *_: None)
    events = read_events(folder / "events.jsonl")
    return [event for event in events if (event["event"], event["round"]) == ("client", 2)], kept


def stayed_home(after: Any, before: Any) -> int:
    """Bytes of the experts whose numbers did not change, less the M flags with which a tensor names those that did."""
    kept = 0
    for name, value in after.items():
        same = sum(bool((value[e] == before[name][e]).all()) for e in range(len(value)))
        kept += same * value[0].nbytes - len(value) * (same > 0)
    return kept


def one_case(number: int) -> dict[str, Any]:
    from ubsmoe.plan.forecast import forecast

    name, config, changes, tier = CASES[number]
    with tempfile.TemporaryDirectory() as scratch:
        settings = settings_of(make_base(config, Path(scratch) / "base"), changes)
        make_base(config | {name: size for name, size in TINY.items() if name in config}, Path(scratch) / "tiny")
        plan = forecast(settings)
        client = plan["tiers"][tier]  # four clients in four tiers: a tier is its client
        worker = [sys.executable, __file__, "--memory-of", str(number), "--bases", scratch]
        real = json.loads(subprocess.run(worker, check=True, capture_output=True, env={**os.environ, **AT_ONCE}).stdout)
        # the counter is slow and bytes do not depend on what is trained: small batches do for both
        light = settings_of(Path(scratch) / "base", {**changes, "train.batch_size": 3})
        counted, planned = count_flops(light, tier), forecast(light, flops_per_second=1e9)["tiers"][tier]["flops"]
        events, kept = run_events(light, Path(scratch) / "run")
    tiers = plan["tiers"]
    down = all(event["download_bytes"] == tiers[event["tier"]]["download_bytes"] for event in events)
    up = all(event["upload_bytes"] == tiers[event["tier"]]["upload_bytes"] - kept[event["client"]] for event in events)
    shares = [event["upload_bytes"] / tiers[event["tier"]]["upload_bytes"] for event in events]
    return {
        "case": name,
        "flops": {"plan": planned, "real": counted, "ratio": planned / counted},
        "memory": {
            "plan": client["peak_memory_bytes"],
            "real": real["memory_bytes"],
            "ratio": client["peak_memory_bytes"] / real["memory_bytes"],
            "parts": client["memory"],
        },
        "download_equal": down,
        "upload_equal_but_for_untouched": up,
        "upload_real_over_plan": shares,
        "seconds_real_over_plan": real["seconds"] / client["seconds"],
        "runtime_bytes": real["runtime_bytes"],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three cases")
    parser.add_argument("--only", type=int, nargs="+", help="these cases, counted from 0")
    parser.add_argument("--memory-of", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--bases", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the record goes (default: %(default)s)")
    options = parser.parse_args()
    if options.memory_of is not None:
        _, _, changes, tier = CASES[options.memory_of]
        real, tiny = (settings_of(options.bases / name, changes) for name in ("base", "tiny"))
        print(json.dumps(measure_memory(real, tiny, tier)))
        return 0
    import torch

    torch.set_num_threads(1)
    chosen = options.only or range(3 if options.quick else len(CASES))
    rows = []
    print(
        "| case | FLOPs, plan / real | memory, plan / real | MB | runtime, MB | down equal | up equal but for untouched experts "
        "| up, real / plan | seconds, real / plan |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for number in chosen:
        row = one_case(number)
        rows.append(row)
        print(
            f"| {row['case']} | {row['flops']['ratio']:.4f} | {row['memory']['ratio']:.3f} | "
            f"{row['memory']['real'] / 1e6:.0f} | {row['runtime_bytes'] / 1e6:.0f} | "
            f"{'yes' if row['download_equal'] else 'NO'} | {'yes' if row['upload_equal_but_for_untouched'] else 'NO'} | "
            f"{min(row['upload_real_over_plan']):.3f} to {max(row['upload_real_over_plan']):.3f} | "
            f"{row['seconds_real_over_plan']:.2f} |",
            flush=True,
        )
    record = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "seed": 0,
        "rows": rows,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
