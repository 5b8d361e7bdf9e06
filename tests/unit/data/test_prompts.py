from hypothesis import given
from hypothesis import strategies as st

from ubsmoe.data.prompts import TEMPLATES

PREAMBLE = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
INDENT = " " * 16


def test_the_llm_adapters_training_prompt_has_its_source_codes_indentation() -> None:
    lines = TEMPLATES["llm_adapters"][0]("Why?").split("\n")
    assert lines == [
        PREAMBLE + "  ",
        "",
        INDENT + "### Instruction:",
        INDENT + "Why?",
        INDENT,
        INDENT + "### Response:",
        INDENT,
    ]


def test_the_llm_adapters_evaluation_prompt_differs_in_one_space_and_one_line() -> None:
    lines = TEMPLATES["llm_adapters"][1]("Why?").split("\n")
    assert lines == [
        PREAMBLE + " ",
        "",
        INDENT + "### Instruction:",
        INDENT + "Why?",
        "",
        INDENT + "### Response:",
        INDENT,
    ]


@given(st.text(min_size=1))
def test_every_template_holds_the_instruction_untouched(instruction: str) -> None:
    for train, test in TEMPLATES.values():
        assert instruction in train(instruction)
        assert instruction in test(instruction)


def test_our_own_template_is_the_same_in_training_and_evaluation_and_ends_without_a_space() -> None:
    train, test = TEMPLATES["plain"]
    assert train("Why?") == test("Why?") == "### Instruction:\nWhy?\n\n### Response:\n"
