"""The synthetic QA data set: questions about invented facts, the package's own offline data.

A data set has entities with invented names ("Morkus"). Each lives in a region, has one value of every relation (colour, home,
food, ...) from a short list of plain English words, and one friend, another entity. Its properties:

- **Facts are shared, questions are not.** Training and test questions ask about the same facts; a question's identity
  (its task, wording, entity and claim) falls into exactly one split, by a hash. Learning the facts is the only way up.
- **No shortcut.** Every value is held by equally many entities (give or take one), so the right option stands in each
  place equally often and the options shown say nothing about which of them is right: without the facts one can only
  guess.
- **Fixed option lists.** A question with N options shows the group of N values that holds the right one, always in
  the same order. A label then depends on the entity and the relation alone, and answering is recall; matching
  shuffled options to a recalled value is a skill that a model of a few million parameters did not acquire in minutes
  of pretraining.
- **Deterministic.** All is a function of the seeds, through `random.Random` and SHA-256, in every process and on
  every machine.
- **Two families of names.** Names of the `pretraining` family never occur in an `evaluation` data set: a base pretrained
  on one knows the formats and how to recall a fact, and none of the facts that it will be fine-tuned on.

The eight tasks of Commonsense-15K (see `tasks.py`) ask about different relations, so a split by task or by region is
far from IID.
"""

import hashlib
import random
from dataclasses import dataclass
from typing import Literal

from ubsmoe.data.tasks import TASKS, Example

Family = Literal["evaluation", "pretraining"]
Split = Literal["train", "test"]

# Lists divide into fixed groups of 2, 3 or 4, whatever the tasks that ask for them need.
RELATIONS: dict[str, tuple[str, ...]] = {
    "colour": ("red", "blue", "green", "white", "black", "brown", "yellow", "grey"),
    "home": ("river", "forest", "desert", "mountain", "valley", "island", "village", "castle"),
    "food": ("bread", "honey", "fish", "apples", "rice", "cheese", "corn", "nuts"),
    "material": ("stone", "glass", "iron", "wood", "clay", "silver", "wool", "paper"),
    "tool": ("hammer", "rope", "lamp", "needle", "wheel", "knife", "basket", "broom"),
    "habit": ("sing", "sleep", "dance", "read", "swim", "run", "write", "paint"),
    "mood": ("proud", "calm", "angry", "happy", "shy", "brave"),
}
REGIONS = ("north", "east", "south", "west")

_STATEMENTS: dict[str, tuple[str, ...]] = {
    "colour": ("{name} is {value}.", "The colour of {name} is {value}.", "{name} has a {value} coat."),
    "home": (
        "{name} lives in the {value}.",
        "The home of {name} is the {value}.",
        "You will find {name} in the {value}.",
    ),
    "food": ("{name} eats {value}.", "The food of {name} is {value}.", "{name} is fond of {value}."),
    "material": ("{name} is made of {value}.", "The body of {name} is of {value}.", "{name} was built from {value}."),
    "tool": ("{name} works with a {value}.", "The tool of {name} is the {value}.", "{name} owns a {value}."),
    "habit": (
        "In the evening {name} likes to {value}.",
        "{name} loves to {value}.",
        "The habit of {name} is to {value}.",
    ),
    "mood": ("{name} feels {value}.", "The mood of {name} is {value}.", "Most days {name} is {value}."),
    "friend": ("The friend of {name} is {value}.", "{name} is a friend of {value}.", "{name} likes {value}."),
}


@dataclass(frozen=True)
class Ask:
    """One way for a task to ask about a relation; every opener goes with every core, which makes plenty of wordings."""

    relation: str
    openers: tuple[str, ...]
    cores: tuple[str, ...]
    option: str = "{value}"
    of_friend: bool = False  # ask it of the friend instead: a question of two hops


_QUESTION = ("", "Tell me: ", "Say it: ", "Now, ", "Well, ", "Quick: ")
_TIME = ("In the evening ", "After lunch ", "All day ", "At night ", "In summer ", "On a holiday ")

ASKS: dict[str, tuple[Ask, ...]] = {
    "boolq": (
        Ask(
            "colour",
            _QUESTION,
            (
                "is {name} {value}?",
                "is the colour of {name} {value}?",
                "does {name} look {value}?",
                "has {name} a {value} coat?",
            ),
        ),
        Ask(
            "food",
            _QUESTION,
            (
                "does {name} eat {value}?",
                "is the food of {name} {value}?",
                "is {name} fond of {value}?",
                "would {name} like {value}?",
            ),
        ),
    ),
    "piqa": (
        Ask(
            "home",
            _QUESTION,
            (
                "how to find {name}?",
                "how to visit {name}?",
                "where to meet {name}?",
                "where to send a letter for {name}?",
            ),
            option="go to the {value}",
        ),
    ),
    "social_i_qa": (
        Ask(
            "mood",
            ("", "A guest comes. ", "It is raining. ", "A stranger waves. ", "The day is over. ", "A child laughs. "),
            (
                "How does {name} feel?",
                "What is the mood of {name}?",
                "How would you describe {name}?",
                "How is {name} now?",
            ),
        ),
    ),
    "hellaswag": (
        Ask(
            "habit",
            _TIME,
            ("{name} likes to", "{name} begins to", "{name} would love to", "you may see how {name} will"),
        ),
    ),
    "winogrande": (
        Ask(
            "food",
            _TIME,
            ("{name} eats _ .", "{name} is fond of _ .", "we cook _ for {name} .", "{name} buys some _ ."),
        ),
    ),
    "ARC-Easy": (
        Ask(
            "material",
            _QUESTION,
            ("what is {name} made of?", "of what is the body of {name}?", "which material is {name}?"),
        ),
        Ask(
            "colour", _QUESTION, ("what colour is {name}?", "what is the colour of {name}?", "which colour has {name}?")
        ),
    ),
    "ARC-Challenge": tuple(
        Ask(
            relation,
            _QUESTION,
            (
                f"what is the {relation} of the friend of {{name}}?",
                f"the friend of {{name}} has which {relation}?",
                f"{{name}} has a friend of which {relation}?",
            ),
            of_friend=True,
        )
        for relation in ("colour", "home", "material")
    ),
    "openbookqa": (
        Ask(
            "tool",
            _QUESTION,
            ("which tool does {name} use?", "what is the tool of {name}?", "with what does {name} work?"),
        ),
        Ask(
            "habit",
            _QUESTION,
            ("what is the habit of {name}?", "what does {name} love to do?", "what will {name} do today?"),
        ),
    ),
}

# 40 heads by 40 tails: short enough that a small tokenizer gives a name about two tokens, many enough for many data sets.
_HEADS = tuple(c + v for c in ("B", "D", "F", "K", "L", "M", "N", "R") for v in ("al", "er", "in", "or", "um"))
_TAILS = tuple(c + v for c in ("b", "d", "f", "k", "m", "n", "t", "v") for v in ("a", "ex", "is", "o", "us"))


def _digest(*parts: object) -> int:
    return int.from_bytes(hashlib.sha256("|".join(map(str, parts)).encode()).digest()[:8], "big")


def names(family: Family) -> list[str]:
    """All names that a family of data sets draws from; the two families share none."""
    wanted = 0 if family == "evaluation" else 1
    return [h + t for h in _HEADS for t in _TAILS if _digest("name", h, t) % 2 == wanted]


def options_around(relation: str, value: str, size: int) -> tuple[str, ...]:
    """The fixed group of a relation's values that holds this one, in the relation's own order.

    >>> options_around("colour", "black", 4)
    ('black', 'brown', 'yellow', 'grey')
    """
    values = RELATIONS[relation]
    start = values.index(value) // size * size
    return values[start : start + size]


class SyntheticQA:
    """Entities and their facts, the sentences that state them and the questions that ask for them.

    >>> data = SyntheticQA(seed=0, num_entities=8)
    >>> question = data.examples("test", count=1, seed=0)[0]
    >>> question.answer in question.candidates
    True
    """

    def __init__(self, seed: int, num_entities: int = 48, family: Family = "evaluation") -> None:
        """Draw the facts.

        Args:
            seed: which data set of the family; another seed gives other names and other facts.
            num_entities: how many entities, the dial of difficulty; at least 8, so that every value is somebody's.
            family: which names to use, see the module's text.
        """
        pool = names(family)
        if not 8 <= num_entities <= len(pool):
            raise ValueError(f"num_entities must be between 8 and {len(pool)}, got {num_entities}")
        rng = random.Random(_digest("world", family, seed))  # the text is part of every seed: it must not change
        self.seed, self.family = seed, family
        self.entities: list[str] = rng.sample(pool, num_entities)
        self.facts: dict[str, dict[str, str]] = {
            relation: _assign(values, self.entities, rng) for relation, values in RELATIONS.items()
        }
        # The entities are in random order already, so a ring is a random friend for each, and each has one
        # who likes it.
        self.facts["friend"] = dict(zip(self.entities, self.entities[1:] + self.entities[:1], strict=True))
        self.region: dict[str, str] = _assign(REGIONS, self.entities, rng)

    def statement(self, name: str, relation: str, rng: random.Random) -> str:
        """One fact as a sentence, in a random wording."""
        return rng.choice(_STATEMENTS[relation]).format(name=name, value=self.facts[relation][name])

    def sentences(self, rng: random.Random) -> list[str]:
        """Every fact stated once, in a random wording and order."""
        stated = [self.statement(name, relation, rng) for relation, fact in self.facts.items() for name in fact]
        rng.shuffle(stated)
        return stated

    def examples(self, split: Split, count: int, seed: int, tasks: tuple[str, ...] = tuple(ASKS)) -> list[Example]:
        """Questions of one split, the tasks taking turns; drawn independently, so a long list repeats some.

        Args:
            split: "train" or "test"; no question of one is ever in the other, whatever the seeds.
            count: how many.
            seed: which draw.
            tasks: which of the eight tasks to ask.
        """
        if split not in ("train", "test"):
            raise ValueError(f'split must be "train" or "test", got {split!r}')
        if unknown := [task for task in tasks if task not in ASKS]:
            raise ValueError(f"tasks must be among {', '.join(ASKS)}, got {', '.join(unknown)}")
        rng = random.Random(_digest("examples", self.family, self.seed, split, seed))
        drawn = [self._draw(tasks[i % len(tasks)], split, rng) for i in range(count)]
        rng.shuffle(drawn)
        return drawn

    def _draw(self, task: str, split: Split, rng: random.Random) -> Example:
        """Draw questions of a task until one belongs to the split; about one in five is a test question."""
        while True:
            example = self._ask(task, rng)
            held_out = _digest(self.family, self.seed, task, example.prompt) % 5 == 0
            if held_out == (split == "test"):
                return example

    def _ask(self, task: str, rng: random.Random) -> Example:
        """A random question of a task with its answer."""
        ask, name = rng.choice(ASKS[task]), rng.choice(self.entities)
        subject = self.facts["friend"][name] if ask.of_friend else name
        truth = self.facts[ask.relation][subject]
        options = options_around(ask.relation, truth, TASKS[task].num_options)
        wording = rng.choice(ask.openers) + rng.choice(ask.cores)
        fields = {"region": self.region[name], "entity": name, "relation": ask.relation}
        if task == "boolq":  # claim the truth or its partner, one as often as the other
            claim = rng.choice(options)
            return TASKS[task].example(wording.format(name=name, value=claim), (), int(claim != truth), **fields)
        worded = [ask.option.format(value=option) for option in options]
        return TASKS[task].example(wording.format(name=name), worded, options.index(truth), **fields)


def _assign(values: tuple[str, ...], entities: list[str], rng: random.Random) -> dict[str, str]:
    """Give every entity a value, each value to equally many entities, give or take one."""
    assigned = (list(values) * -(-len(entities) // len(values)))[: len(entities)]
    rng.shuffle(assigned)
    return dict(zip(entities, assigned, strict=True))
