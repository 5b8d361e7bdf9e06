"""Examples become token ids once; then they are padded into batches.

Prompt and completion are tokenised apart and joined. Given one text, a tokenizer may merge across the boundary, and the
model would be trained on a prompt that generation never shows it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Int
from torch import Tensor

from ubsmoe.config import ConfigError, DataSettings
from ubsmoe.data.prompts import template_of
from ubsmoe.data.tasks import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

POOL = 16
IGNORED = -100  # the label that torch's and transformers' cross-entropy skips


@dataclass(frozen=True)
class Tokens:
    """One example: the ids of prompt, completion and end of text; the first `prompt_length` are the prompt's."""

    input_ids: tuple[int, ...]
    prompt_length: int


def check_tokenizer(tokenizer: "PreTrainedTokenizerBase", vocab_size: int) -> None:
    """Refuse a tokenizer that does not belong to the model.

    Args:
        tokenizer: the tokenizer that came with model.base.
        vocab_size: rows of the model's embedding.

    Raises:
        ConfigError: if an id has no row in the embedding, or there is no token for the end of a text.
    """
    largest = max(tokenizer.get_vocab().values())
    if largest >= vocab_size:
        raise ConfigError(
            f"model.base: its tokenizer has token ids up to {largest}, but its model has a vocabulary of {vocab_size}; "
            "expected a tokenizer made for this model"
        )
    if tokenizer.eos_token_id is None:
        raise ConfigError("model.base: its tokenizer has no eos token, so a model could never learn to stop")


def pad_id(tokenizer: "PreTrainedTokenizerBase") -> int:
    """The id to pad with: the pad token, else the end of text, which is safe since masks and labels skip padding."""
    return int(tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id)


def tokenize(
    examples: Sequence[Example],
    tokenizer: "PreTrainedTokenizerBase",
    settings: DataSettings,
    split: Literal["train", "test"],
) -> list[Tokens]:
    """Word every example with the run's template and turn it into token ids.

    A beginning-of-text token stands in front if the tokenizer puts one there by itself. An example longer than
    `max_length` loses the left end of its prompt.

    Args:
        examples: their templated prompts are taken as they are.
        tokenizer: of the base model.
        settings: the run's [data]; gives template and max_length, in tokens.
        split: a template may word its prompt differently for testing.

    Returns:
        One Tokens per example, in order.

    Raises:
        ConfigError: if an answer leaves no room for even one token of its prompt.
    """
    if not examples:
        return []
    word = template_of(settings.template)[0 if split == "train" else 1]
    prompts = _encode([e.prompt if e.templated else word(e.prompt) for e in examples], tokenizer)
    completions = _encode([e.completion for e in examples], tokenizer)
    start = _start(tokenizer)
    return [
        _join(
            start,
            prompt,
            (*completion, int(tokenizer.eos_token_id)),
            settings.max_length,
            example.where or f"example {number}",
        )
        for number, (example, prompt, completion) in enumerate(zip(examples, prompts, completions, strict=True), 1)
    ]


def fitting(examples: Sequence[Example], tokenizer: "PreTrainedTokenizerBase", settings: DataSettings) -> list[Example]:
    """The examples that `tokenize` would not refuse, whichever of their candidates is the answer.

    Args:
        examples: some of them too long.
        tokenizer: of the base model.
        settings: the run's [data]; gives max_length, in tokens.
    """
    words = [_spellings(example) for example in examples]
    lengths = iter([len(ids) for ids in _encode([text for group in words for text in group], tokenizer)])
    longest = [max(next(lengths) for _ in group) for group in words]
    room = settings.max_length - len(_start(tokenizer)) - 2  # of the prompt, and the end of the text
    return [example for example, length in zip(examples, longest, strict=True) if length <= room]


def _spellings(example: Example) -> list[str]:
    """The completion, and what it would be with each other candidate."""
    others = [label for label in example.candidates if example.answer and label != example.answer]
    return [example.completion, *(example.completion.replace(example.answer, label) for label in others)]


def collate(tokens: Sequence[Tokens], pad_id: int, loss_on_prompt: bool = False) -> dict[str, Int[Tensor, "B T"]]:
    """Pad examples on the right, for training and for likelihoods.

    Args:
        tokens: B examples, the longest of T tokens.
        pad_id: see `pad_id`.
        loss_on_prompt: keep the labels of the prompt too; by default only completion and end of text have any.

    Returns:
        input_ids, attention_mask and labels, int64. Labels are not shifted: transformers does that.
    """
    rows, length = len(tokens), max(len(one.input_ids) for one in tokens)
    input_ids = torch.full((rows, length), pad_id)
    labels = torch.full((rows, length), IGNORED)
    attention_mask = torch.zeros(rows, length, dtype=torch.int64)
    for row, one in enumerate(tokens):
        end, begin = len(one.input_ids), 0 if loss_on_prompt else one.prompt_length
        input_ids[row, :end] = torch.tensor(one.input_ids)
        labels[row, begin:end] = input_ids[row, begin:end]
        attention_mask[row, :end] = 1
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def collate_prompts(tokens: Sequence[Tokens], pad_id: int) -> dict[str, Int[Tensor, "B P"]]:
    """Pad prompts, without their completions, on the left, so that generation continues at the same column for all.

    Args:
        tokens: B examples, the longest prompt of P tokens.
        pad_id: see `pad_id`.

    Returns:
        input_ids and attention_mask, int64.
    """
    length = max(one.prompt_length for one in tokens)
    input_ids = torch.full((len(tokens), length), pad_id)
    attention_mask = torch.zeros(len(tokens), length, dtype=torch.int64)
    for row, one in enumerate(tokens):
        input_ids[row, length - one.prompt_length :] = torch.tensor(one.input_ids[: one.prompt_length])
        attention_mask[row, length - one.prompt_length :] = 1
    return {"input_ids": input_ids, "attention_mask": attention_mask}


def batches(
    num_examples: int, batch_size: int, generator: torch.Generator, lengths: Sequence[int] | None = None
) -> Iterator[list[int]]:
    """Minibatches of the positions 0..num_examples - 1 without end, each pass in a fresh order; one batch of it may be short.

    One pass has ceil(num_examples / batch_size) batches, so epochs and steps are both a matter of how many are taken.

    Args:
        num_examples: N.
        batch_size: examples per batch.
        generator: draws the orders.
        lengths: tokens of every example: then those of like length, among `POOL` batches drawn together, share a batch, and
            little of it is padding.

    Raises:
        ValueError: at the first batch, if there are no examples.
    """
    if num_examples < 1:
        raise ValueError("batches of no examples: expected num_examples of at least 1")
    while True:
        order: list[int] = torch.randperm(num_examples, generator=generator).tolist()
        if lengths is not None:
            pools = _cut(order, POOL * batch_size)
            order = [i for pool in pools for i in sorted(pool, key=lengths.__getitem__)]
        cut = _cut(order, batch_size)
        # in order of length they would be a curriculum
        turn = range(len(cut)) if lengths is None else torch.randperm(len(cut), generator=generator).tolist()
        yield from (cut[i] for i in turn)


def _cut(order: list[int], size: int) -> list[list[int]]:
    return [order[begin : begin + size] for begin in range(0, len(order), size)]


def _encode(texts: list[str], tokenizer: "PreTrainedTokenizerBase") -> list[list[int]]:
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=False).input_ids
    return ids


def _start(tokenizer: "PreTrainedTokenizerBase") -> tuple[int, ...]:
    """What the tokenizer puts in front of every text by itself: its beginning-of-text token, or nothing."""
    first = tuple(tokenizer("a").input_ids[:1])
    return first if first == (tokenizer.bos_token_id,) else ()


def _join(start: tuple[int, ...], prompt: list[int], answer: tuple[int, ...], max_length: int, where: str) -> Tokens:
    room = max_length - len(start) - len(answer)
    if room < 1:
        raise ConfigError(
            f"data.max_length is {max_length}, but the answer of {where} alone takes {len(answer)} tokens and the prompt needs at "
            f'least {len(start) + 1}; raise it to {max_length - room + 1} or more, or set data.too_long = "drop"'
        )
    # A chat template has usually written the beginning-of-text token already; twice would be a text no model has seen.
    body = prompt[1:] if start and prompt[:1] == list(start) else prompt
    kept = (*start, *body[max(0, len(body) - room) :])
    return Tokens(kept + answer, len(kept))
