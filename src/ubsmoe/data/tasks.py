"""The eight answer formats of Commonsense-15K/170K: what a question looks like and how an answer is read.

Source: LLM-Adapters (Hu et al. 2023, arXiv 2304.01933), the commonsense data and `commonsense_evaluate.py`; wordings
and patterns are facts of that protocol, the code is ours.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Example:
    """One question with its answer.

    `answer` is the short label that scoring compares ("answer2"), `completion` the text a model is trained to write
    ("the correct answer is answer2"), `candidates` every label the question admits (empty for free text), `fields`
    whatever else a partition may group by. A `templated` prompt is fed to the model as it is; any other is an
    instruction that still gets the run's template. `where` is the file and line that it was read from.
    """

    prompt: str
    completion: str
    task: str = ""
    answer: str = ""
    candidates: tuple[str, ...] = ()
    fields: dict[str, str] = field(default_factory=dict)
    templated: bool = False
    where: str = field(default="", compare=False)


@dataclass(frozen=True)
class TaskFormat:
    """How one of the eight tasks words its question and its labels ("answer" -> answer1, answer2, ...)."""

    name: str
    instruction: str
    option: str  # "" for true/false
    num_options: int
    pattern: str
    option_separator: str = " "
    format_separator: str = "\n\n"

    @property
    def labels(self) -> tuple[str, ...]:
        """Every label this task may use, in order."""
        if not self.option:
            return ("true", "false")
        return tuple(f"{self.option}{i}" for i in range(1, self.num_options + 1))

    def example(self, question: str, options: Sequence[str], gold: int, **fields: str) -> Example:
        """Word a question the way LLM-Adapters does.

        Args:
            question: the question, goal or sentence.
            options: the choices in order; for true/false pass none and let `gold` be 0 for true, 1 for false.
            gold: zero-based index of the right choice.
            fields: anything a partition may group by.
        """
        labels = self.labels if not self.option else tuple(f"{self.option}{i + 1}" for i in range(len(options)))
        lines = self.option_separator.join(
            f"{label.capitalize()}: {text}" for label, text in zip(labels, options, strict=False)
        )
        body = f"{question}\n\n" + (f"{lines}{self.format_separator}" if options else "")
        answer = labels[gold]
        return Example(
            prompt=f"{self.instruction} {body}Answer format: {'/'.join(labels)}",
            completion=f"the correct answer is {answer}",
            task=self.name,
            answer=answer,
            candidates=labels,
            fields={"task": self.name, **fields},
        )


_CHOOSE = "Please choose the correct answer to the question:"
_ANSWERS = "answer1|answer2|answer3|answer4|answer5"

TASKS: dict[str, TaskFormat] = {
    task.name: task
    for task in (
        TaskFormat("boolq", "Please answer the following question with true or false, question:", "", 2, "true|false"),
        TaskFormat(
            "piqa",
            "Please choose the correct solution to the question:",
            "solution",
            2,
            "solution1|solution2",
            option_separator="\n\n",
        ),
        TaskFormat("social_i_qa", _CHOOSE, "answer", 3, _ANSWERS),
        TaskFormat(
            "hellaswag",
            "Please choose the correct ending to complete the given sentence:",
            "ending",
            4,
            "ending1|ending2|ending3|ending4",
        ),
        TaskFormat(
            "winogrande",
            "Please choose the correct answer to fill in the blank to complete the given sentence:",
            "option",
            2,
            "option1|option2",
            format_separator=" ",
        ),
        TaskFormat("ARC-Easy", _CHOOSE, "answer", 4, _ANSWERS),
        TaskFormat("ARC-Challenge", _CHOOSE, "answer", 4, _ANSWERS),
        TaskFormat("openbookqa", _CHOOSE, "answer", 4, _ANSWERS),
    )
}


def extract_answer(task: str, text: str) -> str | None:
    """Read the label out of generated text: the first match of the task's pattern, case-sensitive; None if unparsed.

    >>> extract_answer("piqa", "the correct answer is solution2, not solution1")
    'solution2'
    >>> extract_answer("piqa", "Solution2") is None
    True
    """
    found = re.search(TASKS[task].pattern, text)
    return found.group(0) if found else None
