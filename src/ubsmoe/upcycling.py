"""`ubsmoe upcycle`: from a dense checkpoint to a folder that model.base can name."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ubsmoe.config import DataSettings
from ubsmoe.data.records import read_file
from ubsmoe.data.tokens import batches, collate, pad_id, tokenize
from ubsmoe.model.surgery import SparseModel
from ubsmoe.model.upcycle import load_dense, mean_activations, upcycle, warm_up
from ubsmoe.seeds import generator_for
from ubsmoe.storage.exportfolder import check_free, write_folder

BATCH_SIZE = 8


def upcycle_checkpoint(
    dense: str,
    out: Path,
    *,
    num_experts: int,
    top_k: int,
    drop: float = 0.0,
    slices: int = 1,
    shared: float = 0.0,
    warm_up_data: Path | None = None,
    warm_up_steps: int = 40,
    seed: int = 0,
) -> list[float]:
    """Upcycle, warm the routers up if there is data to do it on, and save in bfloat16.

    Args:
        dense: a folder, hub id or .gguf file.
        out: a folder that does not exist yet.
        num_experts: M.
        top_k: K_max.
        drop: this and the next two: see `model.upcycle`.
        slices: experts per copy of the feed-forward.
        shared: share of it that is not cut.
        warm_up_data: a file of records, as data.train, for the routers' warm-up and to see which dimensions act most;
            None for neither.
        warm_up_steps: batches of 8 records.
        seed: of all draws.

    Returns:
        The balancing loss of each warm-up step.

    Raises:
        UserError: if the model cannot be upcycled or `out` is taken; then nothing is written.
    """
    check_free(out)
    source, tokenizer = load_dense(dense)
    data = [] if warm_up_data is None else list(_batches(warm_up_data, tokenizer, warm_up_steps, seed))
    active = mean_activations(source, data) if shared and data else None
    model = upcycle(source, num_experts, top_k, drop, seed, slices=slices, shared=shared, activations=active)
    losses = warm_up(SparseModel(model), data) if data else []
    model.to(torch.bfloat16)

    def fill(folder: Path) -> None:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    write_folder(out, fill)
    return losses


def _batches(path: Path, tokenizer: Any, steps: int, seed: int) -> Iterator[dict[str, Tensor]]:
    tokens = tokenize(read_file(path, tokenizer), tokenizer, DataSettings(), "train")
    order = batches(len(tokens), BATCH_SIZE, generator_for(seed, "warm-up"))
    for _ in range(steps):
        yield collate([tokens[i] for i in next(order)], pad_id(tokenizer))
