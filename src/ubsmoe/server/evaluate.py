"""Loss, generation accuracy and likelihood accuracy of whatever budget and adapter are in place on the model.

Generation accuracy is LLM-Adapters' protocol: decode, take the first label that matches the task's pattern, compare; an answer
without a label counts as wrong and is also reported as unparsed. Likelihood accuracy ranks the candidate answers by their
log-probability instead and cannot be unparsed. They are different metrics and are never mixed.
"""

import re
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any, TypedDict

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, StoppingCriteria, StoppingCriteriaList

from ubsmoe.config import DataSettings, EvaluateSettings
from ubsmoe.data.tasks import TASKS, Example, extract_answer
from ubsmoe.data.tokens import Tokens, collate_prompts, pad_id, tokenize
from ubsmoe.model.surgery import SparseModel


class Answer(TypedDict):
    """What the model said to a prompt, beside the right completion, and whether it counted as right."""

    prompt: str
    truth: str
    said: str
    right: bool


ANSWERS_KEPT = 2  # of each task, the shortest prompts: for people to read, before and after training


@dataclass(frozen=True)
class Score:
    """How a model does on one task.

    `loss` is nats per token of the right answers. `accuracy` and `unparsed` come from generation, `mc_accuracy` from ranking the
    candidates (None for free text, when switched off, or where a completion does not spell its label). `chance` guesses
    among the candidates, `majority` always says the test set's most frequent answer.
    """

    examples: int
    loss: float
    accuracy: float
    unparsed: float
    mc_accuracy: float | None
    chance: float | None
    majority: float | None
    answers: list[Answer] = field(default_factory=list, compare=False)

    def figures(self) -> dict[str, Any]:
        """Everything but the answers."""
        return {name: value for name, value in asdict(self).items() if name != "answers"}


@dataclass(frozen=True)
class Question:
    """An example made ready: the tokens of its prompt and right answer, and those of every candidate (`gold` is the right one)."""

    example: Example
    tokens: Tokens
    candidates: list[tuple[int, ...]]
    gold: int


def prepare(
    examples: Mapping[str, Sequence[Example]], tokenizer: Any, data: DataSettings, settings: EvaluateSettings
) -> dict[str, list[Question]]:
    """Tokenise the test sets once: every tier and every round asks the same questions."""
    return {
        task: [_question(example, tokenizer, data, settings) for example in group[: settings.max_examples]]
        for task, group in examples.items()
    }


@torch.no_grad()
def evaluate(
    model: SparseModel, tokenizer: Any, questions: Mapping[str, Sequence[Question]], settings: EvaluateSettings
) -> dict[str, Score]:
    """Score every task, and their unweighted mean under "macro".

    Args:
        model: with the budget and adapter to be judged already in place.
        tokenizer: the base's.
        questions: what `prepare` made.
        settings: [evaluate].
    """
    scores = {task: _score_task(model, tokenizer, group, settings) for task, group in questions.items() if group}
    scores["macro"] = _macro(list(scores.values()))
    return scores


def _question(example: Example, tokenizer: Any, data: DataSettings, settings: EvaluateSettings) -> Question:
    completion, variants, gold = example.completion, [example], 0
    spelt = [found.span() for found in _label(example.answer).finditer(completion)] if example.answer else []
    if settings.mc_accuracy and len(example.candidates) > 1 and spelt:
        # a candidate's completion is the right one with its label exchanged
        start, end = spelt[-1]
        words = [completion[:start] + label + completion[end:] for label in example.candidates]
        variants, gold = [replace(example, completion=text) for text in words], example.candidates.index(example.answer)
    tokens = tokenize(variants, tokenizer, data, "test")
    return Question(example, tokens[gold], [one.input_ids[one.prompt_length :] for one in tokens], gold)


def _score_task(model: SparseModel, tokenizer: Any, questions: Sequence[Question], settings: EvaluateSettings) -> Score:
    loss, tokens, ranked, right, unparsed = 0.0, 0, 0, 0, 0
    answers: list[Answer] = []
    for batch in _by_length(questions, settings.batch_size):
        inputs = collate_prompts([question.tokens for question in batch], pad_id(tokenizer))
        inputs = {name: value.to(model.model.device) for name, value in inputs.items()}
        for question, logs in zip(batch, candidate_logs(model, inputs, batch), strict=True):
            loss -= float(logs[question.gold])
            tokens += len(question.candidates[question.gold])
            ranked += int(logs.argmax()) == question.gold
        for question, text in zip(batch, _generate(model, tokenizer, inputs, batch, settings), strict=True):
            said = _answer(question.example, text)
            unparsed += said is None
            hit = said is not None and said in _right_answers(question.example)
            right += hit
            if len(answers) < ANSWERS_KEPT:
                example = question.example
                answers.append(Answer(prompt=example.prompt, truth=example.completion, said=text, right=hit))
    count = len(questions)
    choices = [len(question.example.candidates) for question in questions]
    closed, rankable = all(choices), all(len(question.candidates) > 1 for question in questions)
    most_frequent = Counter(question.example.answer for question in questions).most_common(1)[0][1]
    return Score(
        examples=count,
        loss=loss / max(tokens, 1),
        accuracy=right / count,
        unparsed=unparsed / count,
        mc_accuracy=ranked / count if rankable else None,
        chance=statistics.fmean(1 / n for n in choices) if closed else None,
        majority=most_frequent / count if closed else None,
        answers=answers,
    )


def _by_length(questions: Sequence[Question], batch_size: int) -> Iterator[list[Question]]:
    """Batches of like length, so that little padding is computed."""
    ordered = sorted(questions, key=lambda question: question.tokens.prompt_length)
    for start in range(0, len(ordered), batch_size):
        yield ordered[start : start + batch_size]


def candidate_logs(model: SparseModel, inputs: dict[str, Tensor], batch: Sequence[Question]) -> list[Tensor]:
    """Per question, the log-probability of each candidate. The prompt is read once, its cache shared by the candidates."""
    cache = DynamicCache(config=model.model.config)
    # the state of convolutions and state spaces is not repeated, even by a layer that repeats its attention's
    if any(hasattr(layer, "conv_states") or not hasattr(layer, "batch_repeat_interleave") for layer in cache.layers):
        return _logs_without_cache(model, batch)
    positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp_min(0)
    last = torch.zeros_like(inputs["attention_mask"], dtype=torch.bool)
    last[:, -1] = True
    with model.reading(last):
        first = model.model(**inputs, position_ids=positions, past_key_values=cache).logits[0]
    width = max(len(question.candidates) for question in batch)
    cache.batch_repeat_interleave(width)
    rows = [tokens for question in batch for tokens in (question.candidates * width)[:width]]
    length = max(map(len, rows))
    ids = torch.tensor([[*tokens] + [0] * (length - len(tokens)) for tokens in rows], device=first.device)
    real = torch.tensor([[1] * len(tokens) + [0] * (length - len(tokens)) for tokens in rows], device=first.device)
    logs = torch.zeros(real.shape, device=first.device)
    logs[:, 0] = first.float().log_softmax(-1).repeat_interleave(width, 0).gather(-1, ids[:, :1]).squeeze(-1)
    if length > 1:
        start = positions[:, -1:].repeat_interleave(width, 0)
        after = real[:, 1:].bool()
        with model.reading(after):
            later = model.model(
                input_ids=ids[:, :-1],
                attention_mask=torch.cat([inputs["attention_mask"].repeat_interleave(width, 0), real[:, :-1]], dim=1),
                position_ids=start + torch.arange(1, length, device=ids.device),
                past_key_values=cache,
            ).logits[0]
        logs[:, 1:][after] = later.float().log_softmax(-1).gather(-1, ids[:, 1:][after].unsqueeze(-1)).squeeze(-1)
    totals = logs.sum(-1).view(len(batch), width).cpu()
    return [total[: len(question.candidates)] for total, question in zip(totals, batch, strict=True)]


def _logs_without_cache(model: SparseModel, batch: Sequence[Question]) -> list[Tensor]:
    """The same for hybrid mixtures: the state of a linear attention or a state space cannot be shared by several tokens.

    Prompt and candidate are read as one text, padded on the right, where padding reaches nothing before it.
    """
    rows = [
        (question.tokens.prompt_length, question.tokens.input_ids, one)
        for question in batch
        for one in question.candidates
    ]
    texts = [(*ids[:start], *candidate) for start, ids, candidate in rows]
    length, device = max(map(len, texts)), model.model.device
    ids = torch.tensor([[*text] + [0] * (length - len(text)) for text in texts], device=device)
    real = torch.tensor([[1] * len(text) + [0] * (length - len(text)) for text in texts], device=device)
    places = torch.arange(length - 1, device=device)
    starts = torch.tensor([start for start, _, _ in rows], device=device).unsqueeze(1)
    said = (places >= starts - 1) & real[:, 1:].bool()  # positions whose next token is the candidate's
    found = model.logits_at(ids, real, said).float().log_softmax(-1)
    logs = torch.zeros(said.shape, device=device)
    logs[said] = found.gather(-1, ids[:, 1:][said].unsqueeze(-1)).squeeze(-1)
    return list(logs.sum(-1).cpu().split([len(question.candidates) for question in batch]))


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

    def __init__(self, tokenizer: Any, tasks: list[str], prompt_length: int) -> None:
        self.tokenizer, self.tasks, self.prompt_length = tokenizer, tasks, prompt_length

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        texts = self.tokenizer.batch_decode(input_ids[:, self.prompt_length :], skip_special_tokens=True)
        done = [
            task in TASKS and extract_answer(task, text) is not None
            for task, text in zip(self.tasks, texts, strict=True)
        ]
        return torch.tensor(done, device=input_ids.device)


def _generate(
    model: SparseModel, tokenizer: Any, inputs: dict[str, Tensor], batch: Sequence[Question], settings: EvaluateSettings
) -> list[str]:
    """Decode an answer to each prompt: greedy with an early stop, or the paper's beam search, which cannot be cut short."""
    length = inputs["input_ids"].shape[1]
    how: dict[str, Any] = {"num_beams": settings.num_beams}
    if settings.decoding == "greedy":
        stop = _StopAtLabel(tokenizer, [question.example.task for question in batch], length)
        how = {"stopping_criteria": StoppingCriteriaList([stop])}
    with own_generation(model.model, tokenizer):
        out = model.model.generate(**inputs, **how, do_sample=False, max_new_tokens=settings.max_new_tokens)
    texts: list[str] = tokenizer.batch_decode(out[:, length:], skip_special_tokens=True)
    return texts


def _answer(example: Example, text: str) -> str | None:
    """What the generated text says: its first label, by the task's pattern or among the candidates; free text as a whole."""
    if example.task in TASKS:
        return extract_answer(example.task, text)
    if not example.candidates:
        return text.strip()
    found = _label(*example.candidates).search(text)
    return found.group(0) if found else None


_SPACED = r"[^\W\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u9fff\uac00-\ud7af]"
"""A word's character, but for Thai, Lao, Burmese, Khmer, Japanese, Chinese and Korean."""


def _label(*labels: str) -> re.Pattern[str]:
    """Any of these labels as a whole word, the longest first: "not-true" is not "true", nor "A" the start of "Apple".

    Where a script puts no space between words, as in "答案是A", any of its letters may stand beside a label.
    """
    either = "|".join(map(re.escape, sorted(labels, key=len, reverse=True)))
    return re.compile(rf"(?<!{_SPACED})(?:{either})(?!{_SPACED})")


def _right_answers(example: Example) -> tuple[str, ...]:
    """What counts as right: the label; in free text the completion, or the short answer that goes with it."""
    free = example.task not in TASKS and not example.candidates
    right = (example.completion.strip(), example.answer) if free else (example.answer,)
    return tuple(text for text in right if text)  # saying nothing is never right


def _macro(scores: Sequence[Score]) -> Score:
    """The unweighted mean over tasks; the number of examples is their sum."""
    columns = {name: [score.figures()[name] for score in scores] for name in scores[0].figures()}
    means = {
        name: None if None in values else statistics.fmean(values)
        for name, values in columns.items()
        if name != "examples"
    }
    return Score(examples=sum(columns["examples"]), **means)  # type: ignore[arg-type]
