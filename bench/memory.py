"""What this project holds in memory where it need not: each pair in fresh processes, side by side, on the widths of OLMoE-1B-7B.

    generation   64 prompts, one new token: the head given a strided view, as transformers does, or contiguous rows
    answers      64 questions at once, ranked and answered at K = 2: logits in float32 whole, or some rows at a time, as now
    allocator    resident after a load that converts a checkpoint, freed memory kept from before or from after the load
    workers      the peak of a run with two worker processes, each page counted once, and of one that has none; as above
    checkpoint   the peak above an adapter of 256 MB while it is saved: as one file in memory, or from where it lies
    merged       the peak of private memory above the mapped base while it is merged, by layers: it is one layer's
    adapter      the peak of private memory while an adapter is exported, with the base's weights and without
    micro        the peak above what was resident before a client's step, batch 16, and its seconds, by micro-batch
    message      an update of more than 2 GiB through the codec (needs 12 GB; only when named)

Random weights, bfloat16, hidden 2048, experts of 1024, vocabulary 50304; 2 layers of 16 experts unless said. Seed 0, Linux,
one thread. Peaks are the kernel's: VmHWM, or RssAnon sampled, where a mapped file is not to count.

    python bench/memory.py [generation answers allocator workers checkpoint merged adapter micro message]
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "memory.json"
PAIRS: dict[str, tuple[str, ...]] = {
    "generation": ("strided", "contiguous"),
    "answers": ("whole", "parts"),
    "allocator": ("before", "after"),
    "workers": ("before", "after", "none"),
    "checkpoint": ("joined", "in place"),
    "merged": ("2", "4", "8"),
    "adapter": ("weights", "no weights"),
    "micro": ("16", "4", "1"),
    "message": ("float32",),
}


def status(which: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(which))
    return 1024 * int(line.split()[1])


@contextmanager
def private_peak(found: dict[str, float]) -> Any:
    """Seconds, and the highest RssAnon above that at the start, sampled every 5 ms."""
    peak, stop, before, began = [0], threading.Event(), status("RssAnon"), time.perf_counter()

    def watch() -> None:
        while not stop.wait(0.005):
            peak[0] = max(peak[0], status("RssAnon") - before)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
        found["seconds"] = time.perf_counter() - began
    finally:
        stop.set()
        thread.join()
    found["private_peak_gb"] = peak[0] / 1e9


def make_base(folder: Path, layers: int, fused: bool) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, OlmoeConfig

    from ubsmoe.model.load import shipped_path

    torch.manual_seed(0)
    config = OlmoeConfig(
        hidden_size=2048, intermediate_size=1024, num_hidden_layers=layers, num_attention_heads=16, num_key_value_heads=16,
        num_experts=16, num_experts_per_tok=8, vocab_size=50304, max_position_embeddings=4096,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder, save_original_format=not fused)
    AutoTokenizer.from_pretrained(shipped_path("ubsmoe-tiny")).save_pretrained(folder)


def settings_of(folder: Path, **changes: Any) -> Any:
    from ubsmoe.config import parse_run, with_overrides

    table = {
        "threads": 1, "model": {"base": str(folder)}, "clients": {"count": 4}, "method": {"name": "fedavg"},
        "data": {"synthetic": {"train_examples": 64, "test_examples": 8}}, "train": {"local_steps": 1, "batch_size": 16},
    }  # fmt: skip
    return parse_run(with_overrides(table, changes))


def generation(way: str, scratch: Path) -> dict[str, float]:
    import torch

    from ubsmoe.model.load import load_base

    make_base(scratch / "base", 2, fused=True)
    sparse, _ = load_base(settings_of(scratch / "base").model)
    if way == "strided":
        sparse.model.get_output_embeddings()._forward_pre_hooks.clear()
    ids = torch.randint(100, 4000, (64, 16), generator=torch.Generator().manual_seed(0))
    found: dict[str, float] = {}

    def answer(rows: Any) -> None:
        sparse.model.generate(input_ids=rows, attention_mask=torch.ones_like(rows), do_sample=False, max_new_tokens=1)

    answer(ids[:2])
    with private_peak(found):
        answer(ids)
    return found


def answers(way: str, scratch: Path) -> dict[str, float]:
    from ubsmoe.config import EvaluateSettings
    from ubsmoe.plan.forecast import forecast
    from ubsmoe.server import answers
    from ubsmoe.server.evaluate import evaluate
    from ubsmoe.server.federation import build_server

    make_base(scratch / "base", 2, fused=True)
    settings = settings_of(scratch / "base", **{"data.synthetic.test_examples": 64, "tiers.budgets": [0.25]})
    server = build_server(settings, weights=True)
    if way == "whole":
        answers._ROWS = 1 << 30
    questions = {"all": [one for group in server.questions.values() for one in group][:64]}
    server.model.set_top_k(2)
    found: dict[str, float] = {}
    with private_peak(found):
        scores = evaluate(server.model, server.tokenizer, questions, EvaluateSettings(max_new_tokens=8))
    planned = forecast(settings, flops_per_second=1e9)
    above = planned["evaluation"]["memory_bytes"] - planned["tiers"][0]["memory"]["weights"]
    return {**found, "loss": scores["macro"].loss, "planned_gb": above / 1e9}


def allocator(way: str, scratch: Path) -> dict[str, float]:
    from ubsmoe.client.allocator import keep_freed_memory
    from ubsmoe.model.load import load_base

    make = [sys.executable, __file__, "--make", str(scratch / "base")]
    subprocess.run(make, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    if way == "before":
        keep_freed_memory()
    began = time.perf_counter()
    sparse, _ = load_base(settings_of(scratch / "base").model)
    keep_freed_memory()
    weights = sum(p.nbytes for p in sparse.model.parameters())
    return {"seconds": time.perf_counter() - began, "resident_gb": status("VmRSS") / 1e9, "weights_gb": weights / 1e9}


def workers(way: str, scratch: Path) -> dict[str, float]:
    """Pss counts a page that n processes share as a part of n in each, so that the sum over all is what the machine holds."""
    from ubsmoe.client.allocator import keep_freed_memory
    from ubsmoe.engines.local import LocalEngine, process_pool
    from ubsmoe.messages import Task
    from ubsmoe.server.federation import build_federation
    from ubsmoe.server.start import start_state

    make = [sys.executable, __file__, "--make", str(scratch / "base")]
    subprocess.run(make, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    if way == "before":
        keep_freed_memory()
    changes = {"train.batch_size": 4, "data.synthetic.entities": 8, "clients.count": 2, "tiers.budgets": [0.25]}
    federation = build_federation(settings_of(scratch / "base", **changes))
    keep_freed_memory()
    payload, found, stop = start_state(federation).adapters, {"held_gb": 0.0}, threading.Event()
    tasks = [Task(1, profile, payload) for profile in federation.clients]
    with process_pool(federation, 1 if way == "none" else 2) as pool:
        processes: list[int | None] = [os.getpid(), *(worker.process.pid for worker in (pool._workers if pool else ()))]

        def watch() -> None:
            while not stop.wait(0.05):
                found["held_gb"] = max(found["held_gb"], sum(map(anonymous_share, processes)) / 1e9)

        thread = threading.Thread(target=watch)
        thread.start()
        list(LocalEngine(federation.trainer, federation.examples, federation.clients, pool=pool).exchange(tasks))
        stop.set()
        thread.join()
    return found


def anonymous_share(process: int | None) -> int:
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("Pss_Anon:"))


def checkpoint(way: str, scratch: Path) -> dict[str, float]:
    import torch

    from ubsmoe.storage import disk
    from ubsmoe.storage.checkpoints import save_checkpoint
    from ubsmoe.storage.tensors import tensor_bytes

    adapter = {f"layers.{i}.up.A": torch.randn(64, 8, 2048) for i in range(61)}
    found: dict[str, float] = {}
    with private_peak(found):
        if way == "joined":
            disk.atomic_write(scratch / "state", tensor_bytes(adapter))
        else:
            save_checkpoint(scratch / "state", 1, adapter, {})
    return found


def finished_run(scratch: Path, layers: int) -> Path:
    """A run's folder with a random adapter of rank 8, as if it had been trained."""
    import torch

    from ubsmoe.config import to_json
    from ubsmoe.model.load import load_skeleton
    from ubsmoe.storage.runfolder import RunFolder

    make_base(scratch / "base", layers, fused=True)
    settings = settings_of(scratch / "base")
    generator = torch.Generator().manual_seed(0)
    adapter = load_skeleton(settings.model).fresh_adapter(8, generator, shared_a=True)
    for tensor in adapter.values():  # B starts at zero, and an adapter without effect is not exported
        tensor.normal_(0, 0.01, generator=generator)
    sha = subprocess.run(
        [sys.executable, "-m", "ubsmoe", "base", "hash", str(scratch / "base")],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    with RunFolder.open_or_create(scratch / "run", to_json(settings)) as folder:
        done = folder.write_adapter(adapter, {"method": "fedavg", "alpha": 16.0, "base_sha256": sha})
        folder.write_summary({"adapter_sha256": done})
    return scratch / "run"


def merged(way: str, scratch: Path) -> dict[str, float]:
    return exported(scratch, int(way), "merged")


def adapter(way: str, scratch: Path) -> dict[str, float]:
    return exported(scratch, 4, "peft" if way == "no weights" else "weights")


def exported(scratch: Path, layers: int, format: str) -> dict[str, float]:
    """In a process of its own, in which nothing was made: `ubsmoe export` of a run, or opening it with its base's weights."""
    run = finished_run(scratch, layers)
    code = f"""
import json, sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from memory import private_peak
from ubsmoe.finished.run import export_run, open_run
found = {{}}
with private_peak(found):
    run = open_run(Path({str(run)!r})) if {format!r} == "weights" else None
    model = run and run.install(run.tier(None))
    export_run(Path({str(run)!r}), Path({str(scratch / "out")!r}), "peft" if run else {format!r})
print(json.dumps(found))
"""
    out = subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True).stdout
    found: dict[str, float] = json.loads(out.splitlines()[-1])
    from ubsmoe.plan.tiers import export_costs, plan_tiers

    costs = export_costs(plan_tiers(settings_of(scratch / "base")))
    return {**found, "planned_gb": costs["merged" if format == "merged" else "peft"]["memory_bytes"] / 1e9}


def micro(way: str, scratch: Path) -> dict[str, float]:
    from ubsmoe.client.train import train
    from ubsmoe.messages import Task
    from ubsmoe.plan.forecast import forecast
    from ubsmoe.server.federation import build_federation
    from ubsmoe.server.start import start_state

    make_base(scratch / "base", 2, fused=True)
    changes = {"train.micro_batch": int(way), "train.local_steps": 3, "data.synthetic.entities": 8}
    settings = settings_of(scratch / "base", **changes)
    federation = build_federation(settings)
    profile = federation.clients[1]
    task = Task(1, profile, federation.method.dispatch(start_state(federation), profile))
    found: dict[str, float] = {}
    with private_peak(found):
        update = train(federation.trainer, task, federation.examples[profile.client])
    planned = forecast(settings, flops_per_second=1e9)["tiers"][1]
    above = planned["own_memory_bytes"] - planned["memory"]["task"]
    return {**found, "planned_gb": above / 1e9, "loss": update.loss}


def message(way: str, scratch: Path) -> dict[str, float]:
    import torch

    from ubsmoe.messages import Profile, Task, Update
    from ubsmoe.wire.codec import decode_update, encode_update
    from ubsmoe.wire.packed import MAX_MESSAGE_BYTES

    before = {f"layers.{i}.up.A": torch.zeros(64, 560, 2048) for i in range(8)}
    after = {name: value + 1 for name, value in before.items()}
    task = Task(1, Profile("a", 0, 1.0, 8, 560, 1), before)
    counts = torch.zeros(8, 64, dtype=torch.int64)
    packed = encode_update(Update("a", 1, 1, after, counts, 0, 0, 0.0, 0.0), task.payload)
    del after
    back = decode_update(packed, MAX_MESSAGE_BYTES, task.payload)
    assert all(bool((value == 1).all()) for value in back.adapters.values())
    return {"message_gib": len(packed.tensors) / 2**30}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[*PAIRS, []], help="which; all but message when left out")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.make:
        return make_base(options.make, 2, fused=False)
    if options.one:
        name, way = options.one
        with tempfile.TemporaryDirectory() as scratch:
            return print(json.dumps(globals()[name](way, Path(scratch))))
    record = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in options.names or [name for name in PAIRS if name != "message"]:
        record[name] = {}
        for way in PAIRS[name]:
            worker = [sys.executable, __file__, "--one", name, way]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            out = subprocess.run(worker, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
            record[name][way] = json.loads(out.splitlines()[-1])
            print(name, way, "  ".join(f"{key} {value:.3g}" for key, value in record[name][way].items()), flush=True)
        RESULTS.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
