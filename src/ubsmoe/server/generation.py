"""Generation by transformers, from prompts on: beam search, or greedily up to the label."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from ubsmoe.config import EvaluateSettings
from ubsmoe.data.tasks import TASKS, extract_answer
from ubsmoe.data.tokens import Tokens, collate_prompts, pad_id
from ubsmoe.model.surgery import SparseModel


def generate(
    model: SparseModel, tokenizer: Any, prompts: Sequence[Tokens], tasks: Sequence[str], settings: EvaluateSettings
) -> list[str]:
    """Decode an answer to each prompt: greedy with an early stop, or the paper's beam search, which cannot be cut short."""
    inputs = collate_prompts(prompts, pad_id(tokenizer))
    inputs = {name: value.to(model.model.device) for name, value in inputs.items()}
    length = inputs["input_ids"].shape[1]
    how: dict[str, Any] = {"num_beams": settings.num_beams}
    if settings.decoding == "greedy":
        how = {"stopping_criteria": StoppingCriteriaList([_StopAtLabel(tokenizer, tasks, length)])}
    with own_generation(model.model, tokenizer):
        out = model.model.generate(**inputs, **how, do_sample=False, max_new_tokens=settings.max_new_tokens)
    texts: list[str] = tokenizer.batch_decode(out[:, length:], skip_special_tokens=True)
    return texts


@contextmanager
def own_generation(model: Any, tokenizer: Any) -> Iterator[None]:
    """Inside, generation follows what is asked for and nothing that the base's generation_config.json says."""
    stock = model.generation_config
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=pad_id(tokenizer))
    try:
        yield
    finally:
        model.generation_config = stock


class _StopAtLabel(StoppingCriteria):
    """Ends a row as soon as its label is readable: later tokens cannot change the first match."""

    def __init__(self, tokenizer: Any, tasks: Sequence[str], prompt_length: int) -> None:
        self.tokenizer, self.tasks, self.prompt_length = tokenizer, tasks, prompt_length

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        texts = self.tokenizer.batch_decode(input_ids[:, self.prompt_length :], skip_special_tokens=True)
        done = [
            task in TASKS and extract_answer(task, text) is not None
            for task, text in zip(self.tasks, texts, strict=True)
        ]
        return torch.tensor(done, device=input_ids.device)
