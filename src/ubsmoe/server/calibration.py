"""Text to fit a compensation on: what the base itself writes, or examples from a file. Never the clients' data nor a test set.

The base writes from the beginning of the run's prompt template on, at temperature 1, so that its text looks as what the clients
will show it. Nothing is needed but the weights.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ubsmoe.config import RunSettings
from ubsmoe.data.prompts import template_of
from ubsmoe.data.tokens import Tokens, collate, pad_id
from ubsmoe.model.conventions import experts_run_by
from ubsmoe.model.experts import IMPLEMENTATION
from ubsmoe.model.surgery import SparseModel
from ubsmoe.seeds import seed_for

BATCH = 32


@torch.no_grad()
def written_by_base(model: SparseModel, tokenizer: object, settings: RunSettings, tokens: int) -> list[Tokens]:
    """Text that the base writes at K_max without an adapter: at least `tokens` of it, none longer than data.max_length.

    The draws follow from the run's seed; the global generator is left as it was.
    """
    begin, _ = template_of(settings.data.template)[0]("\0").split("\0")
    rows = min(BATCH, 1 + tokens // BATCH)  # a few tokens need no whole batch of texts
    prompt = torch.tensor([tokenizer(begin).input_ids] * rows, device=model.device)  # type: ignore[operator]
    texts: list[Tokens] = []
    with torch.random.fork_rng(), experts_run_by(model.model, IMPLEMENTATION):
        torch.manual_seed(seed_for(settings.seed, "calibration"))
        while sum(len(text.input_ids) for text in texts) < tokens:
            out = model.model.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                do_sample=True,
                max_length=settings.data.max_length,
                pad_token_id=pad_id(tokenizer),
                eos_token_id=tokenizer.eos_token_id,  # type: ignore[attr-defined]
            )
            texts += [_until_end(row, prompt.shape[1], tokenizer.eos_token_id) for row in out.tolist()]  # type: ignore[attr-defined]
    return texts


def in_one_batch(texts: Sequence[Tokens], pad: int) -> Mapping[str, Tensor]:
    """input_ids and attention_mask of all texts."""
    batch = collate(texts, pad)
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


def _until_end(ids: list[int], prompt: int, eos: int) -> Tokens:
    """What was written, its end of text included."""
    end = ids.index(eos, prompt) + 1 if eos in ids[prompt:] else len(ids)
    return Tokens(tuple(ids[:end]), prompt)
