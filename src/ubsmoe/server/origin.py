"""What a run was made of, hashed: a checkpoint says it, and goes on only with the same."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import astuple, replace
from typing import Any

from ubsmoe.config import RunSettings
from ubsmoe.config.plug_ins import identities, plug_ins
from ubsmoe.data.prompts import template_of
from ubsmoe.server.answers import Question
from ubsmoe.server.federation import Federation
from ubsmoe.storage.same_run import CLIENT_DATA, QUESTIONS
from ubsmoe.storage.versions import current_versions


def made_with(settings: RunSettings) -> dict[str, str]:
    """The software that a run depends on: versions, and the SHA-256 of the source file of each plug-in."""
    return current_versions() | identities(plug_ins(settings.model_dump(mode="json")))


def origin(federation: Federation) -> dict[str, str]:
    """SHA-256 of base, tokenizer, template, training data and test data, each under the name that a refusal uses.

    Data are hashed by their files, and where there are none as they were split and asked. A server whose clients are elsewhere
    cannot see their data, so that their hash is of nothing.
    """
    data, card = federation.settings.data, federation.data_card
    words = [word("{}") for word in template_of(data.template)]
    train, test = (card[use]["sha256"] if card else {} for use in ("train", "test"))
    asked = ((name, *map(_without_place, group)) for name, group in federation.questions.items())
    held = ((name, *map(astuple, group)) for name, group in federation.examples.items())
    return {
        "base": federation.base_sha256,
        "tokenizer": _sha256([_tokenizer_facts(federation.tokenizer)]),
        "template": _sha256([*words, getattr(federation.tokenizer, "chat_template", None)]),
        **({"data.train": _sha256([train])} if train else {CLIENT_DATA: _sha256(held)}),
        **({"data.test": _sha256([test])} if test else {QUESTIONS: _sha256(asked)}),
    }


def _without_place(question: Question) -> tuple[Any, ...]:
    """A question without the file that it was read from, which may have been moved."""
    return astuple(replace(question, example=replace(question.example, where="")))


def _tokenizer_facts(tokenizer: Any) -> Any:
    """What makes its tokens: all of a fast tokenizer's file but padding and truncation, which each call sets anew."""
    fast = getattr(tokenizer, "backend_tokenizer", None)
    whole = json.loads(fast.to_str()) if fast is not None else {"vocabulary": tokenizer.get_vocab()}
    return {key: value for key, value in whole.items() if key not in ("padding", "truncation")}


def _sha256(parts: Iterable[Any]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(json.dumps(part, sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()
