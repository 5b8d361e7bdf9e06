"""OLMoE-1B-7B's exact shape on eight gigabytes: a random checkpoint is made, prepared, mapped, trained on, exported, and deleted.

    prepare   the checkpoint as the hub stores it (an expert at a time, bfloat16, 13.84 GB) into a cache
    step      seconds until the model can run, and seconds and loss of eight steps of a client: K = 2 on 1 x 128 tokens, LoRA of
              rank 8 on all experts
    resident  the same, NF4, and every page of the weights read
    run       `ubsmoe run`, two clients, two rounds, four steps each; killed in round 2 and resumed: the adapter's hash
    export    that run, as a PEFT adapter under 2 GB, and merged under 4 GB

Each line is a process of its own, which starts with no page of the base in memory. "under 8 GB" is a memory cgroup, and pages of
files count in it; without the right to make one there is no limit. Memory of a process (anonymous) is sampled every 20 ms, what was
resident at most, mapped pages included, is the kernel's. Beside it stands what `ubsmoe plan` says. Needs 47 GB of disk in --folder.

python bench/big_base.py [--folder DIR] [--layers N] [--out FILE]    prints, and writes bench/results/big_base.json
"""

import argparse
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer, OlmoeConfig

from ubsmoe.client.allocator import keep_freed_memory
from ubsmoe.config import ModelSettings
from ubsmoe.model.load import load_base, shipped_path

RESULT = Path(__file__).resolve().parent / "results" / "big_base.json"
CONFIG = Path(__file__).resolve().parent.parent / "src" / "ubsmoe" / "assets" / "configs" / "olmoe-1b-7b.json"
SEED, RANK, TOKENS, TOP_K, STEPS, LIMIT, POOL = 0, 8, 128, 2, 8, 8 * 10**9, 1 << 24
UBSMOE = [sys.executable, "-m", "ubsmoe"]


def make_checkpoint(folder: Path, layers: int) -> None:
    """A shard per layer, with the names and shapes of allenai/OLMoE-1B-7B-0924."""
    config = OlmoeConfig(**{**json.loads(CONFIG.read_text()), "num_hidden_layers": layers, "dtype": "bfloat16"})
    tokenizer = AutoTokenizer.from_pretrained(shipped_path("ubsmoe-tiny"))
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    generator, h, f = torch.Generator().manual_seed(SEED), config.hidden_size, config.intermediate_size

    ring = torch.empty(POOL, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator).repeat(8)

    def normal(*shape: int) -> torch.Tensor:
        """From a random place of the ring on: seven billion draws take minutes, and no two matrices are equal this way either."""
        start = int(torch.randint(POOL, (1,), generator=generator))
        return ring[start : start + math.prod(shape)].view(shape).clone()

    shards = [
        {f"{name}.weight": normal(config.vocab_size, h) for name in ("model.embed_tokens", "lm_head")}
        | {"model.norm.weight": torch.ones(h, dtype=torch.bfloat16)}
    ]
    place: dict[str, str] = {}
    for number in range(layers + 1):
        if number:
            at = f"model.layers.{number - 1}"
            shard = {f"{at}.self_attn.{name}_proj.weight": normal(h, h) for name in "qkvo"}
            norms = "self_attn.q_norm", "self_attn.k_norm", "input_layernorm", "post_attention_layernorm"
            shard |= {f"{at}.{name}.weight": torch.ones(h, dtype=torch.bfloat16) for name in norms}
            shard[f"{at}.mlp.gate.weight"] = normal(config.num_experts, h)
            for expert in range(config.num_experts):
                for name, shape in (("gate", (f, h)), ("up", (f, h)), ("down", (h, f))):
                    shard[f"{at}.mlp.experts.{expert}.{name}_proj.weight"] = normal(*shape)
            shards = [shard]
        file = f"model-{number:05d}.safetensors"
        save_file(shards[0], folder / file, {"format": "pt"})
        place |= dict.fromkeys(shards[0], file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": place}))


RUN = """
threads = 1
[model]
base = "{base}"
dtype = "bfloat16"
{experts}
[method]
name = "fedavg"
[adapter]
rank = {rank}
[clients]
count = 2
[tiers]
budgets = [0.25]
[data]
max_length = {tokens}
[data.synthetic]
entities = 8
train_examples = 64
test_examples = 2
[train]
rounds = 2
local_steps = 4
batch_size = 1
[evaluate]
before = false
max_examples = 1
max_new_tokens = 8
"""


def status(pid: int) -> dict[str, float]:
    """GB of a process now: of its own, mapped from files, and the most that both were together; empty once it has ended."""
    try:
        lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        keys = ("own_gb", "RssAnon"), ("mapped_gb", "RssFile"), ("peak_gb", "VmHWM")
        return {name: round(int(lines[key].split()[0]) * 1024 / 1e9, 2) for name, key in keys}
    except (OSError, KeyError):
        return {}


def step(folder: str, experts: str, all_resident: bool) -> dict[str, Any]:
    """Load, and train for some steps; what a process of the bench does."""
    began, worked = time.perf_counter(), time.process_time()
    settings = ModelSettings(base=folder, dtype="bfloat16", experts=experts if experts != "bf16" else None)
    sparse, _ = load_base(settings)
    found: dict[str, Any] = {"load_seconds": round(time.perf_counter() - began, 2), "sha256": sparse.sha256}
    found["load_cpu_seconds"] = round(time.process_time() - worked, 2)
    keep_freed_memory()
    generator = torch.Generator().manual_seed(SEED)
    sparse.load_adapter(sparse.fresh_adapter(RANK, generator, shared_a=True), alpha=2 * RANK)
    sparse.set_top_k(TOP_K)
    optimizer = torch.optim.AdamW(sparse.adapter.values(), lr=2e-3, fused=True)
    ids = torch.randint(10, sparse.model.config.vocab_size, (1, TOKENS), generator=generator)
    found["losses"], found["step_seconds"], found["step_cpu_seconds"] = [], [], []
    for _ in range(STEPS):
        began, worked = time.perf_counter(), time.process_time()
        optimizer.zero_grad()
        logits = sparse.logits_at(ids, torch.ones_like(ids), torch.ones_like(ids[:, :-1], dtype=torch.bool))
        loss = torch.nn.functional.cross_entropy(logits.float(), ids[0, 1:])
        loss.backward()
        optimizer.step()
        found["losses"].append(loss.item())
        found["step_seconds"].append(round(time.perf_counter() - began, 2))
        found["step_cpu_seconds"].append(round(time.process_time() - worked, 2))
    if all_resident:
        for tensor in (*sparse.model.parameters(), *sparse.model.buffers()):
            if not tensor.is_meta:
                tensor.view(-1).view(torch.uint8)[::4096].sum()
    return found | {"ended": status(os.getpid())}


@contextmanager
def limited(limit: int | None) -> Iterator[Path | None]:
    """A memory cgroup below this process's own; None without a limit, or without the right to make one."""
    groups = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    own = next((Path(f"/sys/fs/cgroup/memory{path}") for _, kind, path in groups if kind == "memory"), None)
    name = "memory.limit_in_bytes"
    if own is None:
        own, name = Path(f"/sys/fs/cgroup{groups[-1][2]}"), "memory.max"
    group = own / f"big-base-{os.getpid()}"
    try:
        if limit is not None:
            group.mkdir()
            (group / name).write_text(str(limit))
        yield group if limit is not None else None
    except OSError as error:
        print(f"no limit: {error}", file=sys.stderr)
        yield None
    finally:
        with suppress(OSError):
            group.rmdir()


def forget_pages(folder: Path) -> None:
    """Drop every page of these files from memory, so that the next process reads, and is charged for, its own."""
    for path in folder.rglob("*.safetensors"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def run(
    command: list[str], place: Path, limit: int | None = None, kill_when: Callable[[], bool] | None = None
) -> dict[str, Any]:
    """Run a process, maybe under a limit, maybe until it is to be killed: seconds, memory, and what it printed last, as JSON."""
    forget_pages(place)
    with limited(limit) as group, tempfile.TemporaryFile("w+") as printed:

        def enter() -> None:
            if group is not None:
                (group / "cgroup.procs").write_text(str(os.getpid()))

        began, own = time.perf_counter(), 0.0
        process = subprocess.Popen(command, stdout=printed, text=True, preexec_fn=enter)
        while not (ended := os.wait4(process.pid, os.WNOHANG))[0]:
            own = max(own, status(process.pid).get("own_gb", 0.0))
            if kill_when and kill_when():
                process.send_signal(signal.SIGKILL)
            time.sleep(0.02)
        found: dict[str, Any] = {"limit_gb": limit / 1e9 if limit and group else None}
        found["seconds"] = round(time.perf_counter() - began, 1)
        found["cpu_seconds"] = round(ended[2].ru_utime + ended[2].ru_stime, 1)
        found["exit_code"] = process.returncode = os.waitstatus_to_exitcode(ended[1])
        found |= {"own_peak_gb": own, "peak_gb": round(ended[2].ru_maxrss * 1024 / 1e9, 2)}
        printed.seek(0)
        with suppress(IndexError, ValueError):
            found |= json.loads(printed.read().splitlines()[-1])
    return found


def planned(run_file: Path) -> dict[str, float]:
    """GB by `ubsmoe plan`: of its own in a step, the same with the whole base, a run in one process, and the exports."""

    def plan(*more: str) -> dict[str, Any]:
        command = [*UBSMOE, "plan", str(run_file), "--json", "--flops-per-second", "1e9", *more]
        return dict(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout))

    full = plan("--examples", "64")  # of data.max_length tokens, all labelled, as those of the step are
    tier, of_run = full["tiers"][0], plan()["tiers"][0]
    step = full["runtime_bytes"] + tier["own_memory_bytes"] - tier["memory"]["task"]  # which comes in a run alone
    server = 2 * of_run["memory"]["adapters"]  # the running sum, and the update that is added to it
    run = full["runtime_bytes"] + of_run["own_memory_bytes"] + server
    parts = {"step": step, "resident": step + tier["memory"]["weights"], "run": run}
    parts |= {name: export["memory_bytes"] + full["runtime_bytes"] for name, export in full["exports"].items()}
    return {name: round(size / 1e9, 2) for name, size in parts.items()}


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--folder", type=Path)
    arguments.add_argument("--layers", type=int, default=16)
    arguments.add_argument("--out", type=Path, default=RESULT)
    arguments.add_argument("--child", nargs=3)
    asked = arguments.parse_args()
    if asked.child:
        return print(json.dumps(child(*asked.child)))
    place = Path(tempfile.mkdtemp(dir=asked.folder, prefix="big-base-"))
    needed, free = 3.4 * 13.84e9 * asked.layers / 16, shutil.disk_usage(place).free
    if free < needed:
        sys.exit(f"{place} has {free / 1e9:.0f} GB free, {needed / 1e9:.0f} GB are needed; see --folder")
    os.environ["HF_HOME"] = str(place / "cache")
    source, lines, plans = place / "checkpoint", dict[str, Any](), dict[str, dict[str, float]]()
    record = {"layers": asked.layers, "tokens": TOKENS, "top_k": TOP_K, "planned_gb": plans, "lines": lines}

    def line(name: str, command: list[str], limit: int | None = None, **more: Any) -> dict[str, Any]:
        lines[name] = run(command, place, limit, **more)
        asked.out.write_text(json.dumps(record, indent=2))
        print(name, json.dumps(lines[name]), flush=True)
        return lines[name]

    def own(what: str, experts: str) -> list[str]:
        return [sys.executable, __file__, "--child", what, str(source), experts]

    try:
        source.mkdir()
        make_checkpoint(source, asked.layers)
        for experts, kind, limit in (("nf4", "peft", 2 * 10**9), ("bf16", "merged", 4 * 10**9)):
            line(f"prepare {experts}", own("prepare", experts))
            plans[experts] = planned(run_file(place, source, experts))
            print(experts, "planned", json.dumps(plans[experts]), flush=True)
            line(f"step {experts} under 8 GB", own("step", experts), LIMIT)
            if experts == "nf4":
                line("nf4 all resident", own("resident", experts))
            whole_and_killed(place, experts, line)
            export = [*UBSMOE, "export", str(place / f"{experts}-whole"), "--out", str(place / kind), "--format", kind]
            line(f"export {kind} under {limit // 10**9} GB", export, limit)
    finally:
        shutil.rmtree(place)


def run_file(place: Path, source: Path, experts: str) -> Path:
    """The run file of a format."""
    file, chosen = place / f"{experts}.toml", "" if experts == "bf16" else f'experts = "{experts}"'
    file.write_text(RUN.format(base=source, experts=chosen, rank=RANK, tokens=TOKENS))
    return file


def whole_and_killed(place: Path, experts: str, line: Callable[..., dict[str, Any]]) -> None:
    """A run, and the same killed while its second round trains, and resumed: adds the hashes to its lines."""

    def command(name: str) -> list[str]:
        return [*UBSMOE, "run", str(place / f"{experts}.toml"), "--out", str(place / f"{experts}-{name}")]

    def in_round_two() -> bool:
        events = place / f"{experts}-killed" / "events.jsonl"
        lines = map(json.loads, events.read_text().splitlines()) if events.exists() else ()
        return any(one["event"] == "client" and one["round"] == 2 for one in lines)

    whole = line(f"run {experts} under 8 GB", command("whole"), LIMIT)
    line(f"run {experts} under 8 GB, killed", command("killed"), LIMIT, kill_when=in_round_two)
    again = line(f"run {experts} under 8 GB, resumed", command("killed"), LIMIT)
    for found, name in ((whole, "whole"), (again, "killed")):
        found["adapter_sha256"] = json.loads((place / f"{experts}-{name}" / "summary.json").read_text())[
            "adapter_sha256"
        ]
    assert whole["adapter_sha256"] == again["adapter_sha256"], "a resumed run ended in other bits"


def child(what: str, source: str, experts: str) -> dict[str, Any]:
    """One line's process."""
    if what != "prepare":
        return step(source, experts, all_resident=what == "resident")
    from ubsmoe.model.load import prepare_base
    from ubsmoe.storage.bases import read_facts

    folder = prepare_base(ModelSettings(base=source, dtype="bfloat16", experts=None if experts == "bf16" else experts))
    return {**(read_facts(folder) or {}), "ended": status(os.getpid())}


if __name__ == "__main__":
    main()
