from itertools import islice
from typing import Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast as Tokenizer

from ubsmoe.config import ConfigError, DataSettings
from ubsmoe.data.prompts import TEMPLATES
from ubsmoe.data.tasks import Example
from ubsmoe.data.tokens import IGNORED, Tokens, batches, check_tokenizer, collate, collate_prompts, pad_id, tokenize

Split = Literal["train", "test"]

texts = st.text(min_size=1, max_size=30)
some_tokens = st.lists(
    st.builds(
        lambda ids, cut: Tokens(tuple(ids), min(cut, len(ids) - 1)),
        st.lists(st.integers(1, 50), min_size=2, max_size=9),
        st.integers(1, 9),
    ),
    min_size=1,
    max_size=5,
)


def one(
    example: Example, tokenizer: Tokenizer, max_length: int = 256, template: str = "plain", split: Split = "train"
) -> Tokens:
    settings = DataSettings.model_validate({"max_length": max_length, "template": template})
    return tokenize([example], tokenizer, settings, split)[0]


def test_a_raw_example_worked_by_hand(tokenizer: Tokenizer) -> None:
    tokens = one(Example("é!", "ab", templated=True), tokenizer)
    ids = tokenizer.convert_tokens_to_ids
    assert tokens == Tokens(tuple(ids(["Ã", "©", "!", "a", "b", "</s>"])), prompt_length=3)


@given(prompt=texts, completion=texts)
def test_the_tokens_read_back_as_template_completion_and_end(
    tokenizer: Tokenizer, prompt: str, completion: str
) -> None:
    tokens = one(Example(prompt, completion), tokenizer)
    assert tokenizer.decode(tokens.input_ids[: tokens.prompt_length]) == TEMPLATES["plain"][0](prompt)
    assert tokenizer.decode(tokens.input_ids[tokens.prompt_length :]) == completion + "</s>"


@given(prompt=texts, first=texts, second=texts)
def test_the_prompts_tokens_do_not_depend_on_the_completion(
    tokenizer: Tokenizer, prompt: str, first: str, second: str
) -> None:
    a, b = (one(Example(prompt, text, templated=True), tokenizer) for text in (first, second))
    assert a.input_ids[: a.prompt_length] == b.input_ids[: b.prompt_length]


@given(prompt=texts, completion=texts, max_length=st.integers(1, 80))
def test_a_long_prompt_loses_its_left_end_and_never_the_answer(
    tokenizer: Tokenizer, prompt: str, completion: str, max_length: int
) -> None:
    full = one(Example(prompt, completion), tokenizer)
    answer = full.input_ids[full.prompt_length :]
    if len(answer) + 1 > max_length:
        with pytest.raises(
            ConfigError, match=rf"data\.max_length is {max_length}.* raise it to {len(answer) + 1} or more"
        ):
            one(Example(prompt, completion), tokenizer, max_length)
        return
    cut = one(Example(prompt, completion), tokenizer, max_length)
    assert cut.input_ids == full.input_ids[-max_length:]
    assert cut.input_ids[cut.prompt_length :] == answer


def test_an_answer_too_long_names_its_example(tokenizer: Tokenizer) -> None:
    settings = DataSettings(max_length=4)
    with pytest.raises(ConfigError, match=r"answer of example 2 alone takes 4 tokens and the prompt needs at least 1"):
        tokenize([Example("a", "b"), Example("a", "xyz")], tokenizer, settings, "train")


def test_the_beginning_token_comes_once_and_survives_truncation(bos_tokenizer: Tokenizer) -> None:
    long = Example("abcdefgh", "x", templated=True)
    assert one(long, bos_tokenizer).input_ids[0] == 0
    cut = one(long, bos_tokenizer, max_length=5)
    assert bos_tokenizer.convert_ids_to_tokens(list(cut.input_ids)) == ["<s>", "g", "h", "x", "</s>"]
    again = one(Example("<s>abcdefgh", "x", templated=True), bos_tokenizer)
    assert again == one(long, bos_tokenizer)
    with pytest.raises(ConfigError, match=r"takes 2 tokens and the prompt needs at least 2; raise it to 4"):
        one(long, bos_tokenizer, max_length=3)


def test_no_beginning_token_is_added_to_a_tokenizer_that_adds_none(tokenizer: Tokenizer) -> None:
    assert one(Example("ab", "c", templated=True), tokenizer).input_ids[0] == tokenizer.convert_tokens_to_ids("a")


def test_a_templated_prompt_is_not_wrapped_and_the_split_chooses_the_template(tokenizer: Tokenizer) -> None:
    def prompt(split: Split, templated: bool) -> str:
        tokens = one(Example("Why?", "x", templated=templated), tokenizer, template="llm_adapters", split=split)
        return str(tokenizer.decode(tokens.input_ids[: tokens.prompt_length]))

    assert prompt("train", templated=True) == prompt("test", templated=True) == "Why?"
    train, test = TEMPLATES["llm_adapters"]
    assert (prompt("train", templated=False), prompt("test", templated=False)) == (train("Why?"), test("Why?"))


def test_no_examples_give_no_tokens(tokenizer: Tokenizer) -> None:
    assert tokenize([], tokenizer, DataSettings(), "test") == []


def test_collating_pads_on_the_right_and_labels_only_the_answer() -> None:
    batch = collate([Tokens((5, 6, 7), 2), Tokens((8, 9, 4, 3), 1)], pad_id=0)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 0], [8, 9, 4, 3]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert batch["labels"].tolist() == [[-100, -100, 7, -100], [-100, 9, 4, 3]]
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())


@given(tokens=some_tokens, loss_on_prompt=st.booleans())
def test_collated_rows_hold_their_tokens_and_labels_and_nothing_else(
    tokens: list[Tokens], loss_on_prompt: bool
) -> None:
    batch = collate(tokens, pad_id=0, loss_on_prompt=loss_on_prompt)
    for row, source in enumerate(tokens):
        kept = batch["attention_mask"][row].bool()
        assert batch["input_ids"][row][kept].tolist() == list(source.input_ids)
        assert (batch["labels"][row][~kept] == IGNORED).all()
        begin = 0 if loss_on_prompt else source.prompt_length
        labels = batch["labels"][row]
        assert labels[labels != IGNORED].tolist() == list(source.input_ids[begin:])


@given(tokens=some_tokens)
def test_collated_prompts_all_end_at_the_last_column(tokens: list[Tokens]) -> None:
    batch = collate_prompts(tokens, pad_id=0)
    for row, source in enumerate(tokens):
        kept = batch["attention_mask"][row].bool()
        assert kept[-source.prompt_length :].all()
        assert batch["input_ids"][row][kept].tolist() == list(source.input_ids[: source.prompt_length])
        assert (batch["input_ids"][row][~kept] == 0).all()


def test_prompts_worked_by_hand() -> None:
    batch = collate_prompts([Tokens((5, 6, 7), 2), Tokens((8, 9, 4, 3), 3)], pad_id=1)
    assert batch["input_ids"].tolist() == [[1, 5, 6], [8, 9, 4]]
    assert batch["attention_mask"].tolist() == [[0, 1, 1], [1, 1, 1]]


@given(num_examples=st.integers(1, 30), batch_size=st.integers(1, 12), seed=st.integers(0, 99))
def test_each_pass_takes_every_example_once(num_examples: int, batch_size: int, seed: int) -> None:
    per_pass = -(-num_examples // batch_size)
    taken = list(islice(batches(num_examples, batch_size, torch.Generator().manual_seed(seed)), 3 * per_pass))
    for start in range(0, len(taken), per_pass):
        one_pass = taken[start : start + per_pass]
        assert sorted(index for batch in one_pass for index in batch) == list(range(num_examples))
        assert all(len(batch) == batch_size for batch in one_pass[:-1])
    assert taken == list(islice(batches(num_examples, batch_size, torch.Generator().manual_seed(seed)), 3 * per_pass))


def test_passes_differ_and_leave_the_global_generator_alone() -> None:
    before = torch.random.get_rng_state()
    first, second = islice(batches(20, 20, torch.Generator().manual_seed(0)), 2)
    assert first != second
    assert torch.equal(before, torch.random.get_rng_state())


def test_batches_by_length_take_every_example_once_and_pad_little() -> None:
    lengths = [10 + (37 * i) % 101 for i in range(203)]

    def padded(taken: list[list[int]]) -> int:
        return sum(len(batch) * max(lengths[i] for i in batch) for batch in taken)

    grouped = list(islice(batches(203, 8, torch.Generator().manual_seed(1), lengths), 26))
    plain = list(islice(batches(203, 8, torch.Generator().manual_seed(1)), 26))
    assert sorted(i for batch in grouped for i in batch) == list(range(203))
    assert sorted(map(len, grouped)) == [3] + [8] * 25
    assert padded(plain) > 1.5 * sum(lengths) and padded(grouped) < 1.15 * sum(lengths)
    longest = [max(lengths[i] for i in batch) for batch in grouped]
    assert longest != sorted(longest)  # no curriculum


def test_batches_of_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="expected num_examples of at least 1"):
        next(batches(0, 4, torch.Generator()))


def test_padding_falls_back_to_the_end_token(tokenizer: Tokenizer, bos_tokenizer: Tokenizer) -> None:
    assert pad_id(tokenizer) == tokenizer.pad_token_id == 2
    assert pad_id(bos_tokenizer) == bos_tokenizer.eos_token_id == 1


def test_a_tokenizer_larger_than_the_model_is_refused(tokenizer: Tokenizer) -> None:
    size = len(tokenizer)
    check_tokenizer(tokenizer, size)
    with pytest.raises(ConfigError, match=rf"model\.base: .* ids up to {size - 1}, .* vocabulary of {size - 1};"):
        check_tokenizer(tokenizer, size - 1)


def test_a_tokenizer_without_an_end_token_is_refused(tokenizer: Tokenizer) -> None:
    endless = Tokenizer(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(ConfigError, match=r"model\.base: its tokenizer has no eos token"):
        check_tokenizer(endless, 1000)
