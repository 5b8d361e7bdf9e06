"""Templates that turn an instruction into the text a model reads before it answers."""

from collections.abc import Callable

from ubsmoe.config.plug_ins import load

_PREAMBLE = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
_INDENT = " " * 16


def plain(instruction: str) -> str:
    """The project's own template: no preamble, no indentation, no trailing space."""
    return f"### Instruction:\n{instruction}\n\n### Response:\n"


def llm_adapters_train(instruction: str) -> str:
    """LLM-Adapters' training prompt, byte for byte, with the indentation of its source code inside the string.

    Source: the LLM-Adapters protocol; see docs/equations.md on why the two differ.
    """
    return (
        f"{_PREAMBLE}  \n\n"
        f"{_INDENT}### Instruction:\n{_INDENT}{instruction}\n{_INDENT}\n"
        f"{_INDENT}### Response:\n{_INDENT}"
    )


def llm_adapters_eval(instruction: str) -> str:
    """LLM-Adapters' evaluation prompt, byte for byte: it is not quite the training prompt."""
    return f"{_PREAMBLE} \n\n{_INDENT}### Instruction:\n{_INDENT}{instruction}\n\n{_INDENT}### Response:\n{_INDENT}"


# name -> (prompt for training, prompt for evaluation)
TEMPLATES: dict[str, tuple[Callable[[str], str], Callable[[str], str]]] = {
    "plain": (plain, plain),
    "llm_adapters": (llm_adapters_train, llm_adapters_eval),
}


def template_of(name: str) -> tuple[Callable[[str], str], Callable[[str], str]]:
    """The prompts of a template for training and for evaluation; a plug-in `instruction -> prompt` is both."""
    if name in TEMPLATES:
        return TEMPLATES[name]
    word = load(name, "data.template")
    return word, word
