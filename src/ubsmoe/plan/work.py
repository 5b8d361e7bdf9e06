"""What each client's round is made of: the shapes of its batches, read from its data or assumed."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ubsmoe.client.schedule import batch_order, in_pieces, steps_per_round
from ubsmoe.config import ConfigError, RunSettings, train_of_tier
from ubsmoe.costs.workload import Batch
from ubsmoe.data.partition import partition_clients, tier_of_client
from ubsmoe.data.sources import load_examples
from ubsmoe.data.tokens import Tokens, tokenize
from ubsmoe.model.load import load_tokenizer
from ubsmoe.plan.evaluation import Asked, read_questions
from ubsmoe.seeds import generator_for


@dataclass(frozen=True)
class Work:
    """One client's round: the forward passes of each of its steps in order, and the largest that it may meet."""

    client: str
    tier: int
    examples: int
    steps: list[list[Batch]]
    largest: Batch

    @property
    def batches(self) -> list[Batch]:
        """All forward passes."""
        return [batch for step in self.steps for batch in step]


BOUND = "data.max_length = {} tokens, every position labelled: an upper bound"


@dataclass(frozen=True)
class Found:
    """The run's work: every client's round, the test questions (None where no data are read), and whence their lengths."""

    clients: list[Work]
    questions: list[Asked] | None
    lengths: str


def found_work(settings: RunSettings, examples: int | None = None) -> Found:
    """What is to be done in a run.

    Lengths are read from the data; or assumed, where a number of examples is given or the base's tokenizer is not here.

    Raises:
        UserError: if the data cannot be had.
    """
    bound = BOUND.format(settings.data.max_length)
    if examples:
        return Found(assumed_work(settings, examples), None, bound)
    try:
        tokenizer = load_tokenizer(settings.model)
    except ConfigError:
        clients, questions = _counted(settings)
        return Found(clients, questions, f"{bound}, since the tokenizer of {settings.model.base} is not here")
    return Found(read_work(settings, tokenizer), read_questions(settings, tokenizer), "read from the data")


def _counted(settings: RunSettings) -> tuple[list[Work], list[Asked]]:
    """Every client's round and the questions, as long as they may be. Raises ConfigError for records that a chat template words."""
    try:
        count = len(load_examples(settings.data, None, settings.seed).train)
        return assumed_work(settings, count), read_questions(settings, None)
    except AttributeError:
        raise ConfigError(
            f"data.train: the tokenizer of {settings.model.base} is not here, and only its chat template can word these "
            "records; say how many there are with --examples"
        ) from None


def read_work(settings: RunSettings, tokenizer: Any) -> list[Work]:
    """Every client's round, from its own data. Raises UserError if that cannot be had."""
    tiers = tier_of_client(settings)
    examples = load_examples(settings.data, tokenizer, settings.seed).train
    parts = partition_clients(settings, examples)
    tokens = tokenize(examples, tokenizer, settings.data, "train")
    return [client_work(settings, client, tiers[client], [tokens[i] for i in part]) for client, part in parts.items()]


def assumed_work(settings: RunSettings, examples: int) -> list[Work]:
    """Every client's round if it has an even share of so many examples, as long as data.max_length allows."""
    train, count = settings.train, settings.clients.count
    if examples < count:
        raise ConfigError(
            f"--examples {examples} leaves some of the {count} clients without any; expected {count} or more"
        )
    share, steps = examples // count, steps_per_round(train, examples // count)

    def work(client: str, tier: int) -> Work:
        pieces = in_pieces(list(range(train.batch_size)), train_of_tier(train, settings.tiers, tier))
        batches = [Batch.full(len(piece), settings.data.max_length) for piece in pieces]
        return Work(client, tier, share, [batches * train.gradient_accumulation] * steps, batches[0])

    return [work(client, tier) for client, tier in tier_of_client(settings).items()]


def client_work(settings: RunSettings, client: str, tier: int, examples: Sequence[Tokens]) -> Work:
    """A client's first round on its own examples, which stands for all of its rounds."""
    train, whole = train_of_tier(settings.train, settings.tiers, tier), settings.data.loss_on_prompt
    order = batch_order(train, examples, generator_for(settings.seed, client, 1, "batches"))

    def step() -> list[Batch]:
        pieces = [piece for _ in range(train.gradient_accumulation) for piece in in_pieces(next(order), train)]
        return [batch_shape([examples[i] for i in piece], whole) for piece in pieces]

    steps = [step() for _ in range(steps_per_round(train, len(examples)))]
    size = train.micro_batch or train.batch_size
    longest = batch_shape(sorted(examples, key=lambda one: len(one.input_ids))[-size:], whole)
    most = sum(sorted(_labels(one, whole) for one in examples)[-size:])
    return Work(client, tier, len(examples), steps, replace(longest, labelled=most))


def batch_shape(examples: Sequence[Tokens], loss_on_prompt: bool = False) -> Batch:
    """The shape of these examples, collated."""
    labelled = sum(_labels(one, loss_on_prompt) for one in examples)
    lengths = [len(one.input_ids) for one in examples]
    return Batch(len(examples), max(lengths), sum(lengths), labelled)


def _labels(one: Tokens, loss_on_prompt: bool) -> int:
    """Positions whose next token has a label; the first token of a text has none before it."""
    return len(one.input_ids) - (1 if loss_on_prompt else one.prompt_length)
