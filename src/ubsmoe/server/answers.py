"""What a model says to a batch of questions: how likely each candidate is, and what it writes by itself.

Nothing is computed twice. A prompt is read once, together with the words that all its candidates begin with; what is left of each
candidate is read from that cache. Wherever a candidate was read it is known what the model would rather have said there, so a
greedy answer follows the candidates without computing anything. Where it leaves them all it goes on token by token, from the
same cache, in a batch that finished answers leave.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, takewhile
from typing import Any

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DummyLayer, DynamicLayer

from ubsmoe.config import EvaluateSettings
from ubsmoe.data.tasks import TASKS, Example, extract_answer
from ubsmoe.data.tokens import Tokens
from ubsmoe.model.surgery import SparseModel
from ubsmoe.server.generation import generate

_ROWS = 64  # of logits in float32 at once

Spelt = tuple[float, list[int]]
"""Of tokens one after another: their log-probability in nats, and the token that the model would rather have said, at each."""


@dataclass(frozen=True)
class Question:
    """An example made ready: the tokens of its prompt and right answer, and those of every candidate (`gold` is the right one)."""

    example: Example
    tokens: Tokens
    candidates: list[tuple[int, ...]]
    gold: int

    @property
    def prompt(self) -> tuple[int, ...]:
        """The tokens before an answer."""
        return self.tokens.input_ids[: self.tokens.prompt_length]

    @property
    def num_common(self) -> int:
        """Tokens that all candidates begin with; never the last one, after which nothing is asked."""
        columns = zip(*(candidate[:-1] for candidate in self.candidates), strict=False)
        return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))


@dataclass(frozen=True)
class Kept:
    """A cache of prompts with candidates, and the mask of what is no padding. The answer in a row begins at column `start[row]`."""

    cache: DynamicCache
    mask: Int[Tensor, "R C"]
    start: list[int]

    def holds(self, more: int) -> bool:
        """Whether that many more columns fit, so that some can be taken back."""
        width = self.mask.shape[1] + more
        return all(
            type(layer) in (DynamicLayer, DummyLayer) or getattr(layer, "sliding_window", 0) > width
            for layer in self.cache.layers
        )


@dataclass(frozen=True)
class Reading:
    """A batch of questions with all their candidates; `kept` is None where the cache cannot be read on from."""

    candidates: list[list[Spelt]]
    kept: Kept | None

    @classmethod
    def of(cls, batch: Sequence[Question], spelt: Sequence[Spelt], kept: Kept | None) -> "Reading":
        """From the candidates of all questions in one list."""
        all_, counts = iter(spelt), [len(question.candidates) for question in batch]
        return cls([[next(all_) for _ in range(count)] for count in counts], kept)


def answers(
    model: SparseModel, tokenizer: Any, batch: Sequence[Question], settings: EvaluateSettings
) -> Iterator[tuple[list[float], str]]:
    """Per question the log-probability of each candidate, and the text that the model writes."""
    reading = read(model, batch)
    if settings.decoding == "beam":  # the paper's; it cannot be cut short
        texts = _from_the_prompts(model, tokenizer, batch, settings)
    else:
        texts = _greedy(model, tokenizer, batch, reading, settings)
    for candidates, text in zip(reading.candidates, texts, strict=True):
        yield [log for log, _ in candidates], text


def read(model: SparseModel, batch: Sequence[Question]) -> Reading:
    """Read every candidate of every question, what they have in common once."""
    cache = DynamicCache(config=model.model.config)
    # the state of convolutions and state spaces is not repeated, even by a layer that repeats its attention's
    if any(hasattr(layer, "conv_states") or not hasattr(layer, "batch_select_indices") for layer in cache.layers):
        return _read_apart(model, batch)
    commons = [question.num_common for question in batch]
    trunks = [(*q.prompt, *q.candidates[0][:n]) for q, n in zip(batch, commons, strict=True)]
    ids, mask = _padded(trunks, model.model.device, left=True)
    pairs = [(n, candidate) for n, question in enumerate(batch) for candidate in question.candidates]
    asked = _columns(ids) >= ids.shape[1] - 1 - _column(commons, ids)
    starts = _starts(n + 1 for n in commons)
    logits = _run(model, ids, mask, cache, asked)
    spelt = _spelt(logits, [(starts[n], candidate[: commons[n] + 1]) for n, candidate in pairs])

    tails = [candidate[commons[n] :] for n, candidate in pairs]
    rows = torch.tensor([n for n, _ in pairs], device=ids.device)
    cache.batch_select_indices(rows)
    mask, width = mask[rows], ids.shape[1]
    if any(len(tail) > 1 for tail in tails):
        ids, real = _padded([tail[:-1] for tail in tails], ids.device)
        mask = torch.cat([mask, real], dim=1)
        logits = _run(model, ids, mask, cache, real.bool())
        starts = _starts(len(tail) - 1 for tail in tails)
        ends = _spelt(logits, [(starts[row], tail[1:]) for row, tail in enumerate(tails)])
        spelt = [(log + more, said + then) for (log, said), (more, then) in zip(spelt, ends, strict=True)]
    return Reading.of(batch, spelt, Kept(cache, mask, [width - commons[n] for n, _ in pairs]))


def _read_apart(model: SparseModel, batch: Sequence[Question]) -> Reading:
    """The same for hybrid mixtures: the state of a linear attention or a state space cannot be shared by several tokens.

    Prompt and candidate are read as one text, padded on the right, where padding reaches nothing before it.
    """
    pairs = [(question.prompt, candidate) for question in batch for candidate in question.candidates]
    ids, real = _padded([(*prompt, *candidate) for prompt, candidate in pairs], model.model.device)
    first = _column([len(prompt) for prompt, _ in pairs], ids) - 1
    asked = (_columns(ids)[:-1] >= first) & real[:, 1:].bool()  # the next token is the candidate's
    starts = _starts(len(candidate) for _, candidate in pairs)
    places = [(starts[row], candidate) for row, (_, candidate) in enumerate(pairs)]
    return Reading.of(batch, _spelt(model.logits_at(ids, real, asked), places), None)


def _starts(lengths: Iterable[int]) -> list[int]:
    """Where each of several runs of rows begins, one after another."""
    return [0, *accumulate(lengths)]


def _columns(ids: Int[Tensor, "R C"]) -> Int[Tensor, " C"]:
    return torch.arange(ids.shape[1], device=ids.device)


def _column(numbers: Sequence[int], ids: Int[Tensor, "R C"]) -> Int[Tensor, "R 1"]:
    return torch.tensor(numbers, device=ids.device).unsqueeze(1)


def _padded(
    rows: Sequence[tuple[int, ...]], device: torch.device, left: bool = False
) -> tuple[Int[Tensor, "R C"], Int[Tensor, "R C"]]:
    """Token ids, and their mask."""
    width = max(map(len, rows))

    def filled(row: Sequence[int]) -> list[int]:
        padding = [0] * (width - len(row))
        return [*padding, *row] if left else [*row, *padding]

    ids, mask = [filled(row) for row in rows], [filled([1] * len(row)) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def _run(
    model: SparseModel,
    ids: Int[Tensor, "R C"],
    mask: Int[Tensor, "R kept"],
    cache: DynamicCache,
    asked: Bool[Tensor, "R C"],
) -> Shaped[Tensor, "N V"]:
    """Logits at the positions that are `asked` for, in row order; `mask` covers what the cache holds too."""
    positions = (mask.cumsum(-1) - 1).clamp_min(0)[:, -ids.shape[1] :]
    with model.reading(asked):
        out = model.model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache)
    logits: Shaped[Tensor, "1 N V"] = out.logits
    return logits[0]


def _spelt(logits: Shaped[Tensor, "N V"], places: Sequence[tuple[int, tuple[int, ...]]]) -> list[Spelt]:
    """Look up tokens that stand one after another, the first of them at a row of `logits`."""
    rows = torch.tensor([first + n for first, tokens in places for n in range(len(tokens))], device=logits.device)
    tokens = torch.tensor([token for _, tokens in places for token in tokens], device=logits.device)
    parts = zip(
        rows.split(_ROWS), tokens.split(_ROWS), strict=True
    )  # float32 of a whole batch would outweigh the model's part
    logs = torch.cat([logits[row].float().log_softmax(-1)[range(len(row)), token] for row, token in parts]).cpu()
    rather: list[int] = logits.argmax(-1).tolist()
    each = logs.split([len(tokens) for _, tokens in places])
    return [(float(log.sum()), rather[first : first + len(log)]) for log, (first, _) in zip(each, places, strict=True)]


def _greedy(
    model: SparseModel, tokenizer: Any, batch: Sequence[Question], reading: Reading, settings: EvaluateSettings
) -> list[str]:
    """Decode an answer to each question, up to its label."""
    most = settings.max_new_tokens
    eos = tokenizer.eos_token_id
    followed = [_follow(q.candidates, own, most, eos) for q, own in zip(batch, reading.candidates, strict=True)]
    said = [tokens for tokens, _ in followed]

    def text(tokens: list[int]) -> str:
        return str(tokenizer.decode(tokens, skip_special_tokens=True))

    def is_over(n: int) -> bool:
        if len(said[n]) >= most or said[n][-1] == eos:
            return True
        task = batch[n].example.task  # later tokens cannot change the first match
        return task in TASKS and extract_answer(task, text(said[n])) is not None

    going = [n for n in range(len(batch)) if not is_over(n)]
    if going and reading.kept and reading.kept.holds(most):
        starts = _starts(len(question.candidates) for question in batch)
        _go_on(model, reading.kept, {n: starts[n] + followed[n][1] for n in going}, said, is_over)
    elif going:
        written = _from_the_prompts(model, tokenizer, [batch[n] for n in going], settings)
        anew = dict(zip(going, written, strict=True))
        return [anew[n] if n in anew else text(tokens) for n, tokens in enumerate(said)]
    return [text(tokens) for tokens in said]


def _follow(
    candidates: Sequence[tuple[int, ...]], spelt: Sequence[Spelt], most: int, eos: int
) -> tuple[list[int], int]:
    """The greedy answer up to where it leaves all candidates, and the last one that it followed."""
    said: list[int] = []
    along = 0
    while len(said) < min(most, len(candidates[along])):
        said.append(spelt[along][1][len(said)])  # what the model says after all that came before
        same = [i for i, candidate in enumerate(candidates) if candidate[: len(said)] == tuple(said)]
        if not same or said[-1] == eos:
            break
        along = same[0]
    return said, along


def _go_on(
    model: SparseModel, kept: Kept, rows: dict[int, int], said: list[list[int]], is_over: Callable[[int], bool]
) -> None:
    """Say token after token, until each answer is over.

    Args:
        model: as it was when the candidates were read.
        kept: what was read.
        rows: of each question that goes on, a row that holds its answer, but for the last token.
        said: the answers; grow.
        is_over: whether one is finished.
    """
    going = list(rows)
    chosen = torch.tensor(list(rows.values()), device=kept.mask.device)
    kept.cache.batch_select_indices(chosen)
    ends = [kept.start[row] + len(said[n]) - 1 for n, row in rows.items()]
    mask = kept.mask[chosen] * (_columns(kept.mask) < _column(ends, kept.mask))
    while going:
        ids = torch.tensor([said[n][-1:] for n in going], device=mask.device)
        mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
        logits = _run(model, ids, mask, kept.cache, torch.ones_like(ids, dtype=torch.bool))
        for n, token in zip(going, logits.argmax(-1).tolist(), strict=True):
            said[n].append(token)
        stay = [row for row, n in enumerate(going) if not is_over(n)]
        if len(stay) < len(going):
            going, chosen = [going[row] for row in stay], torch.tensor(stay, dtype=torch.int64, device=mask.device)
            kept.cache.batch_select_indices(chosen)
            mask = mask[chosen]


def _from_the_prompts(
    model: SparseModel, tokenizer: Any, batch: Sequence[Question], settings: EvaluateSettings
) -> list[str]:
    """Decode anew, by beam search or where no cache could be kept."""
    return generate(model, tokenizer, [q.tokens for q in batch], [q.example.task for q in batch], settings)
