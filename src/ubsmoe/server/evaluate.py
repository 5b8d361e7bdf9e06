"""Loss, generation accuracy and likelihood accuracy of whatever budget and adapter are in place on the model.

Generation accuracy is LLM-Adapters' protocol: decode, take the first label that matches the task's pattern, compare; an answer
without a label counts as wrong and is also reported as unparsed. Likelihood accuracy ranks the candidate answers by their
log-probability instead and cannot be unparsed. They are different metrics and are never mixed.
"""

import re
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, TypedDict

import torch

from ubsmoe import progress
from ubsmoe.config import ConfigError, DataSettings, EvaluateSettings
from ubsmoe.config.plug_ins import load
from ubsmoe.data.tasks import TASKS, Example, extract_answer
from ubsmoe.data.tokens import tokenize
from ubsmoe.model.surgery import SparseModel
from ubsmoe.server.answers import Question, answers, read


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
    among the candidates, `majority` always says the test set's most frequent answer. `metrics` are the means of plug-ins' numbers.
    """

    examples: int
    loss: float
    accuracy: float
    unparsed: float
    mc_accuracy: float | None
    chance: float | None
    majority: float | None
    answers: list[Answer] = field(default_factory=list, compare=False)
    metrics: Mapping[str, float] = field(default_factory=dict)

    def figures(self) -> dict[str, Any]:
        """Everything but the answers, and the numbers of plug-ins where there are none."""
        return {name: value for name, value in asdict(self).items() if name != "answers" and value != {}}


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
    scores = {task: _score_task(task, model, tokenizer, group, settings) for task, group in questions.items() if group}
    scores["macro"] = _macro(list(scores.values()))
    return scores


@torch.no_grad()
def answer_loss(model: SparseModel, questions: Sequence[Question], batch_size: int) -> float:
    """Nats per token of the right answers. As for `evaluate`, but that nothing is generated."""
    loss, tokens = 0.0, 0
    for batch in progress.through(list(_by_length(questions, batch_size)), "validates"):
        for question, candidates in zip(batch, read(model, batch).candidates, strict=True):
            loss -= candidates[question.gold][0]
            tokens += len(question.candidates[question.gold])
    return loss / max(tokens, 1)


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


def _score_task(
    task: str, model: SparseModel, tokenizer: Any, questions: Sequence[Question], settings: EvaluateSettings
) -> Score:
    loss, tokens, ranked, right, unparsed = 0.0, 0, 0, 0, 0
    kept: list[Answer] = []
    own: dict[str, list[float]] = {}
    for batch in progress.through(list(_by_length(questions, settings.batch_size)), f"scores {task}"):
        found = answers(model, tokenizer, batch, settings)
        for question, (logs, text) in zip(batch, found, strict=True):
            loss -= logs[question.gold]
            tokens += len(question.candidates[question.gold])
            ranked += logs.index(max(logs)) == question.gold
            said = _answer(question.example, text)
            unparsed += said is None
            hit = said is not None and said in _right_answers(question.example)
            right += hit
            if len(kept) < ANSWERS_KEPT:
                example = question.example
                kept.append(Answer(prompt=example.prompt, truth=example.completion, said=text, right=hit))
            for name, value in _own_metrics(text, question.example, settings).items():
                own.setdefault(name, []).append(value)
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
        answers=kept,
        metrics={name: statistics.fmean(values) for name, values in own.items()},
    )


def _own_metrics(text: str, example: Example, settings: EvaluateSettings) -> dict[str, float]:
    """What plug-ins `metric(text, example)` say of a generated answer: a number each, or several by name."""
    found: dict[str, float] = {}
    for name in settings.metrics:
        value = load(name, "evaluate.metrics")(text, example)
        named = value if isinstance(value, Mapping) else {name.rpartition(":")[2]: value}
        if not all(isinstance(one, int | float) for one in named.values()):
            raise ConfigError(f"evaluate.metrics: {name} gave {value!r}; expected a number, or numbers by name")
        found |= {key: float(one) for key, one in named.items()}
    return found


def _by_length(questions: Sequence[Question], batch_size: int) -> Iterator[list[Question]]:
    """Batches of like length, so that little padding is computed."""
    ordered = sorted(questions, key=lambda question: question.tokens.prompt_length)
    for start in range(0, len(ordered), batch_size):
        yield ordered[start : start + batch_size]


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
    columns: dict[str, list[Any]] = {
        name: [score.figures().get(name) for score in scores] for name in scores[0].figures()
    }
    means = {
        name: None if None in values else statistics.fmean(values)
        for name, values in columns.items()
        if name not in ("examples", "metrics")
    }
    names = dict.fromkeys(name for score in scores for name in score.metrics)  # a plug-in may give some to some tasks
    metrics = {name: statistics.fmean(one.metrics[name] for one in scores if name in one.metrics) for name in names}
    return Score(examples=sum(columns["examples"]), metrics=metrics, **means)  # type: ignore[arg-type]
