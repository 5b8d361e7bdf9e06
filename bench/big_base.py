"""OLMoE-1B-7B's exact shape on eight gigabytes: a random checkpoint is made, prepared, mapped, trained on, and deleted.

    prepare   the checkpoint as the hub stores it (an expert at a time, bfloat16, 13.84 GB) into a cache: seconds, memory of its own
              (anonymous pages) and all it touched, pages of mapped files included
    load      seconds until the model can run
    step      of a client at K = 2 on 1 x 128 tokens, LoRA of rank 8 on all experts: seconds and loss of three steps, without a
              limit and under one of 8 GB, which holds for pages of files too (a memory cgroup; without the right to make one, none)
    resident  NF4 with every page of the weights in memory

Each line is a process of its own. Needs 32 GB of disk in --folder for ten minutes.

python bench/big_base.py [--folder DIR] [--layers N] [--out FILE]    prints, and writes bench/results/big_base.json
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer, OlmoeConfig

from ubsmoe.config import ModelSettings
from ubsmoe.model.load import load_base, shipped_path

RESULT = Path(__file__).resolve().parent / "results" / "big_base.json"
CONFIG = Path(__file__).resolve().parent.parent / "src" / "ubsmoe" / "assets" / "configs" / "olmoe-1b-7b.json"
SEED, RANK, TOKENS, TOP_K, STEPS, LIMIT = 0, 8, 128, 2, 3, 8 * 10**9


def make_checkpoint(folder: Path, layers: int) -> None:
    """A shard per layer, with the names and shapes of allenai/OLMoE-1B-7B-0924."""
    config = OlmoeConfig(**{**json.loads(CONFIG.read_text()), "num_hidden_layers": layers, "dtype": "bfloat16"})
    tokenizer = AutoTokenizer.from_pretrained(shipped_path("ubsmoe-tiny"))
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    generator, h, f = torch.Generator().manual_seed(SEED), config.hidden_size, config.intermediate_size

    def normal(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)

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


def memory() -> dict[str, float]:
    """GB in this process now: of its own, and mapped from files; and the most that both were together."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {
        name: round(int(status[key].split()[0]) * 1024 / 1e9, 2)
        for name, key in (("own_gb", "RssAnon"), ("mapped_gb", "RssFile"), ("peak_gb", "VmHWM"))
    }


def step(folder: str, experts: str, all_resident: bool) -> dict[str, Any]:
    """Load, and train for some steps; what a process of the bench does."""
    began = time.perf_counter()
    settings = ModelSettings(base=folder, dtype="bfloat16", experts=experts if experts != "bf16" else None)
    sparse, _ = load_base(settings)
    found: dict[str, Any] = {
        "load_seconds": round(time.perf_counter() - began, 2),
        "loaded": memory(),
        "sha256": sparse.sha256,
    }
    generator = torch.Generator().manual_seed(SEED)
    sparse.load_adapter(sparse.fresh_adapter(RANK, generator, shared_a=True), alpha=2 * RANK)
    sparse.set_top_k(TOP_K)
    optimizer = torch.optim.AdamW(sparse.adapter.values(), lr=2e-3, fused=True)
    ids = torch.randint(10, sparse.model.config.vocab_size, (1, TOKENS), generator=generator)
    found["losses"], found["step_seconds"] = [], []
    for _ in range(STEPS):
        began = time.perf_counter()
        optimizer.zero_grad()
        logits = sparse.logits_at(ids, torch.ones_like(ids), torch.ones_like(ids[:, :-1], dtype=torch.bool))
        loss = torch.nn.functional.cross_entropy(logits.float(), ids[0, 1:])
        loss.backward()
        optimizer.step()
        found["losses"].append(loss.item())
        found["step_seconds"].append(round(time.perf_counter() - began, 2))
    if all_resident:
        for tensor in (*sparse.model.parameters(), *sparse.model.buffers()):
            if not tensor.is_meta:
                tensor.view(-1).view(torch.uint8)[::4096].sum()
    return found | {"ended": memory()}


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


def run(command: list[str], limit: int | None = None) -> dict[str, Any]:
    """Run a process, maybe under a limit; what it printed last, as JSON, with its seconds and how it ended."""
    with limited(limit) as group:

        def enter() -> None:
            if group is not None:
                (group / "cgroup.procs").write_text(str(os.getpid()))

        began = time.perf_counter()
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, preexec_fn=enter)
        found = {"limit_gb": limit / 1e9 if limit and group else None, "seconds": round(time.perf_counter() - began, 1)}
    return found | {
        "exit_code": done.returncode,
        **(json.loads(done.stdout.splitlines()[-1]) if not done.returncode else {}),
    }


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
    needed, free = 2.3 * 13.84e9 * asked.layers / 16, shutil.disk_usage(place).free
    if free < needed:
        sys.exit(f"{place} has {free / 1e9:.0f} GB free, {needed / 1e9:.0f} GB are needed; see --folder")
    os.environ["HF_HOME"] = str(place / "cache")
    source, lines = place / "checkpoint", {}

    def line(name: str, what: str, experts: str, limit: int | None = None) -> None:
        command = [sys.executable, __file__, "--child", what, str(source), experts]
        lines[name] = run(command, limit)
        print(name, json.dumps(lines[name]), flush=True)

    try:
        source.mkdir()
        make_checkpoint(source, asked.layers)
        for experts in ("bf16", "nf4"):
            line(f"prepare {experts}", "prepare", experts)
        line("bf16", "step", "bf16")
        for experts in ("bf16", "nf4"):
            line(f"{experts} under 8 GB", "step", experts, LIMIT)
        line("nf4 all resident", "resident", "nf4")
    finally:
        shutil.rmtree(place)
    asked.out.write_text(
        json.dumps({"layers": asked.layers, "tokens": TOKENS, "top_k": TOP_K, "lines": lines}, indent=2)
    )


def child(what: str, source: str, experts: str) -> dict[str, Any]:
    """One line's process."""
    torch.set_num_threads(1)
    if what != "prepare":
        return step(source, experts, all_resident=what == "resident")
    from ubsmoe.model.load import prepare_base
    from ubsmoe.storage.bases import read_facts

    folder = prepare_base(ModelSettings(base=source, dtype="bfloat16", experts=None if experts == "bf16" else experts))
    return {**(read_facts(folder) or {}), "ended": memory()}


if __name__ == "__main__":
    main()
