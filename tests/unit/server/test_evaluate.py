"""Evaluation against direct computation: one unpadded question at a time, no cache, no batching."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from ubsmoe.config import EvaluateSettings, parse_run
from ubsmoe.data.tasks import Example
from ubsmoe.methods.method import install_adapter
from ubsmoe.model.surgery import SparseModel
from ubsmoe.seeds import generator_for
from ubsmoe.server.answers import Question, answers
from ubsmoe.server.evaluate import Score as S
from ubsmoe.server.evaluate import _answer, _macro, _right_answers, evaluate, prepare
from ubsmoe.server.federation import Federation, build_federation
from unit.model.families import tiny


@pytest.fixture(scope="module")
def federation(random_base: Any) -> Federation:
    table = {
        "model": {"base": str(random_base)},
        "adapter": {"rank": 3},
        "clients": {"count": 2},
        "data": {"synthetic": {"train_examples": 8, "test_examples": 24, "entities": 8}},
        "evaluate": {"max_new_tokens": 5},
    }
    return build_federation(parse_run(table))


@pytest.fixture
def model(federation: Federation) -> Any:
    """The base with an adapter that changes its answers, at K = 2."""
    gen = generator_for("adapter")
    fresh = federation.model.fresh_adapter(3, gen, shared_a=False)
    payload = {name: 0.5 * torch.randn(value.shape, generator=gen) for name, value in fresh.items()}
    install_adapter(federation.model, payload, replace(federation.clients[0], top_k=2), alpha=6.0)
    yield federation.model
    federation.model.clear()


@torch.no_grad()
def direct_log(model: Any, prompt: tuple[int, ...], completion: tuple[int, ...]) -> float:
    logits = model.model(input_ids=torch.tensor([prompt + completion]), use_cache=False).logits[0].double()
    logs = logits[len(prompt) - 1 : -1].log_softmax(-1)
    return float(logs.gather(1, torch.tensor(completion).unsqueeze(1)).sum())


def prompt_of(question: Question) -> tuple[int, ...]:
    return question.tokens.input_ids[: question.tokens.prompt_length]


def test_loss_and_ranking_are_those_of_full_forward_passes(federation: Federation, model: Any) -> None:
    scores = evaluate(model, federation.tokenizer, federation.questions, EvaluateSettings(max_new_tokens=1))
    for task, questions in federation.questions.items():
        logs = [[direct_log(model, prompt_of(q), tokens) for tokens in q.candidates] for q in questions]
        right = sum(max(range(len(row)), key=row.__getitem__) == q.gold for q, row in zip(questions, logs, strict=True))
        tokens = sum(len(q.candidates[q.gold]) for q in questions)
        loss = -sum(row[q.gold] for q, row in zip(questions, logs, strict=True)) / tokens
        assert scores[task].mc_accuracy == right / len(questions)
        assert scores[task].loss == pytest.approx(loss, rel=1e-5)


def test_how_many_rows_of_logits_are_in_float32_at_once_changes_nothing(
    federation: Federation, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = EvaluateSettings(max_new_tokens=1)
    whole = evaluate(model, federation.tokenizer, federation.questions, settings)
    monkeypatch.setattr("ubsmoe.server.answers._ROWS", 3)
    assert evaluate(model, federation.tokenizer, federation.questions, settings) == whole


def test_majority_is_the_share_of_the_most_frequent_answer(federation: Federation, model: Any) -> None:
    question = federation.questions["boolq"][0]
    labels = ["true", "false", "false", "true", "false"]
    asked = [replace(question, example=replace(question.example, answer=label)) for label in labels]
    scores = evaluate(model, federation.tokenizer, {"boolq": asked}, EvaluateSettings(max_new_tokens=1))
    assert scores["boolq"].majority == 0.6


@torch.no_grad()
def direct_greedy(model: Any, prompt: tuple[int, ...], most: int, eos: int) -> list[int]:
    ids = list(prompt)
    while len(ids) < len(prompt) + most and eos not in ids[len(prompt) :]:
        ids.append(int(model.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def leaving(said: list[int], eos: int, *, whole: bool) -> list[tuple[int, ...]]:
    """Candidates that greedy decoding leaves at once, after two and after three tokens, or says to its end."""
    other = [eos + 1 if token == eos else token ^ 1 for token in said]
    ways = [(*said[:n], other[n], other[0], eos) for n in (0, 2, 3)]
    return [*ways, tuple(said)] if whole else ways


@torch.no_grad()
@pytest.mark.parametrize("most", [2, 5])
@pytest.mark.parametrize("kind", ["own", "gold alone", "leaving", "said", "common"])
def test_generation_is_greedy_decoding_without_padding(
    federation: Federation, model: Any, kind: str, most: int
) -> None:
    tokenizer, questions = federation.tokenizer, federation.questions["piqa"] + federation.questions["boolq"]
    eos, asked, expected = tokenizer.eos_token_id, [], []
    for question in questions:
        said = direct_greedy(model, prompt_of(question), 5, eos)
        candidates = {
            "own": question.candidates,
            "gold alone": question.candidates[:1],
            "leaving": leaving(said, eos, whole=False),
            "said": leaving(said, eos, whole=True),
            "common": leaving(said, eos, whole=False)[-1:],
        }[kind]
        free = replace(question.example, task="free")
        asked.append(replace(question, example=free, candidates=candidates, gold=0))
        expected.append(tokenizer.decode(said[:most], skip_special_tokens=True))
    found = list(answers(model, tokenizer, asked, EvaluateSettings(max_new_tokens=most)))
    assert [text for _, text in found] == expected
    for question, (logs, _) in zip(asked, found, strict=True):
        for candidate, log in zip(question.candidates, logs, strict=True):
            assert log == pytest.approx(direct_log(model, prompt_of(question), candidate), rel=1e-5)


@torch.no_grad()
def test_no_token_is_computed_twice(federation: Federation, model: Any) -> None:
    """Prompts and what candidates share once, each candidate's own tokens but the last once, then one at a time."""
    tokenizer, (question, *_) = federation.tokenizer, federation.questions["hellaswag"]
    eos, prompt = tokenizer.eos_token_id, prompt_of(question)
    said = direct_greedy(model, prompt, 5, eos)
    assert eos not in said
    candidates = [(*said[:2], 7, 8, eos), (*said[:3], 9, eos)]
    assert said[2] != 7 and said[3] != 9
    asked = replace(question, candidates=candidates, example=replace(question.example, task="free"))
    read: list[int] = []
    hook = model.model.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    list(answers(model, tokenizer, [asked], EvaluateSettings(max_new_tokens=5)))
    hook.remove()
    # behind the shared two: (7, 8) and (said[2], 9) are read; said[3] was found there and is the one token read alone
    assert read == [len(prompt) + 2, 2 * 2, 1]


@torch.no_grad()
@pytest.mark.parametrize("window", [128, 16])
def test_layers_with_a_sliding_window_answer_alike(federation: Federation, window: int) -> None:
    """A window that holds the whole text is read on from; a shorter one has forgotten, and decoding begins anew."""
    vocab = len(federation.tokenizer)
    model = SparseModel(tiny("gpt_oss", vocab_size=vocab, sliding_window=window, max_position_embeddings=256))
    tokenizer, questions = federation.tokenizer, federation.questions["boolq"]
    free = [replace(question, example=replace(question.example, task="free")) for question in questions]
    found = answers(model, tokenizer, free, EvaluateSettings(max_new_tokens=4))
    for question, (logs, text) in zip(free, found, strict=True):
        said = direct_greedy(model, prompt_of(question), 4, tokenizer.eos_token_id)
        assert text == tokenizer.decode(said, skip_special_tokens=True)
        for candidate, log in zip(question.candidates, logs, strict=True):
            assert log == pytest.approx(direct_log(model, prompt_of(question), candidate), rel=1e-4)


@pytest.mark.parametrize("decoding", ["greedy", "beam"])
def test_scores_do_not_depend_on_the_batch_size(federation: Federation, model: Any, decoding: str) -> None:
    one, many = (
        evaluate(
            model,
            federation.tokenizer,
            federation.questions,
            EvaluateSettings(max_new_tokens=3, batch_size=size, decoding=decoding, num_beams=2),  # type: ignore[arg-type]
        )
        for size in (1, 7)
    )
    for task, score in one.items():
        assert many[task].figures() == pytest.approx(score.figures(), rel=1e-5)


def test_a_candidate_is_the_completion_with_its_label_exchanged(federation: Federation) -> None:
    question = federation.questions["hellaswag"][0]
    texts = [federation.tokenizer.decode(tokens, skip_special_tokens=True) for tokens in question.candidates]
    assert texts == [f"the correct answer is ending{i}" for i in (1, 2, 3, 4)]
    assert texts[question.gold].endswith(question.example.answer)


def prepared(federation: Federation, example: Example, **settings: Any) -> dict[str, list[Question]]:
    data = federation.settings.data
    return prepare({example.task: [example]}, federation.tokenizer, data, EvaluateSettings(**settings))


def test_ranking_is_left_out_where_it_means_nothing(federation: Federation, model: Any) -> None:
    closed = Example("Which? Answer format: yes/no", "it is no", "mine", "no", ("yes", "no"))
    unspelt = replace(closed, completion="certainly not so", answer="yes")
    free = Example("Say a word", " hello", "mine")
    settings = EvaluateSettings(max_new_tokens=1)
    for example, ranked in ((closed, True), (unspelt, False), (free, False)):
        scores = evaluate(model, federation.tokenizer, prepared(federation, example), settings)
        assert (scores["mine"].mc_accuracy is not None) == ranked
    off = evaluate(model, federation.tokenizer, prepared(federation, closed, mc_accuracy=False), settings)
    assert off["macro"].mc_accuracy is None and off["macro"].chance == 0.5


@pytest.mark.parametrize(
    ("example", "text", "said", "right"),
    [
        # of the eight tasks: the task's own pattern
        (Example("", "the correct answer is true", "boolq", "true", ("true", "false")), "so true", "true", True),
        (Example("", "the correct answer is true", "boolq", "true", ("true", "false")), "maybe", None, False),
        # other closed questions: the first candidate as a whole word
        (Example("", "it is b", "mine", "b", ("a", "b")), "it is b, not a", "b", True),
        (Example("", "x", "mine", "o1", ("o1", "o10")), "o10", "o10", False),
        (Example("", "x", "ARC-or-openbookqa", "answer2", ("answer1", "answer2")), "the answer2", "answer2", True),
        (Example("", "x", "mine", "b", ("a", "b")), "neither", None, False),
        # scripts that put no space between words
        (Example("", "x", "mine", "B", ("A", "B")), "答案是B。", "B", True),
        (Example("", "x", "mine", "B", ("A", "B")), "정답은 B입니다", "B", True),
        (Example("", "x", "mine", "不是", ("是", "不是")), "我觉得不是", "不是", True),
        (Example("", "x", "mine", "B", ("A", "B")), "Ärger mit Bär", None, False),
        # free text, as a whole
        (Example("", " Paris\n", "free"), "Paris ", "Paris", True),
        (Example("", "so it is 42", "free", "42"), "so it is 42", "so it is 42", True),
        (Example("", "so it is 42", "free", "42"), "42", "42", True),
        (Example("", "so it is 42", "free", "42"), "43", "43", False),
        (Example("", "so it is 42", "free"), "", "", False),  # no label was given, so saying nothing is not it
        # labels inside one another
        (Example("", "x", "mine", "true-ish", ("true", "true-ish")), "true-ish", "true-ish", True),
    ],
)
def test_what_generated_text_says(example: Example, text: str, said: str | None, right: bool) -> None:
    assert _answer(example, text) == said
    assert (said in _right_answers(example)) == right


def test_the_label_that_is_exchanged_is_a_whole_word(federation: Federation) -> None:
    example = Example("Which? Answer format: A/B", "A. An Apple", "mine", "A", ("A", "B"))
    (question,) = prepared(federation, example)["mine"]
    texts = [federation.tokenizer.decode(tokens, skip_special_tokens=True) for tokens in question.candidates]
    assert texts == ["A. An Apple", "B. An Apple"]


def test_the_mean_over_tasks_knows_what_a_plug_in_says_of_some_of_them() -> None:
    plain = S(1, 1.0, 1.0, 0.0, None, None, None)
    first, other = (replace(plain, metrics={"f1": value}) for value in (0.5, 1.0))
    assert _macro([plain, first, other]).metrics == _macro([first, plain, other]).metrics == {"f1": 0.75}


def test_macro_is_the_plain_mean_over_tasks() -> None:
    small, large = S(10, 1.0, 0.2, 0.1, 0.4, 0.5, 0.6), S(90, 3.0, 0.6, 0.0, None, 0.25, 0.3)
    assert _macro([small, large]).figures() == pytest.approx(
        S(100, 2.0, 0.4, 0.05, None, 0.375, 0.45).figures(), nan_ok=False
    )
