"""What each client's round is made of: the shapes of its batches, read from its data or assumed."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ubsmoe.client.schedule import batch_order, steps_per_round
from ubsmoe.config import ConfigError, RunSettings
from ubsmoe.data.partition import partition
from ubsmoe.data.sources import load_examples
from ubsmoe.data.tokens import Tokens, tokenize
from ubsmoe.model.load import load_tokenizer
from ubsmoe.seeds import generator_for


@dataclass(frozen=True)
class Batch:
    """Shape of a forward pass: sequences, their padded length, how many tokens are no padding and how many have a label."""

    rows: int
    length: int
    real: int
    labelled: int


@dataclass(frozen=True)
class Work:
    """One client's round: its batches in order, several per step where gradients accumulate, and the largest it may meet."""

    client: str
    tier: int
    examples: int
    batches: list[Batch]
    largest: Batch


def read_work(settings: RunSettings) -> list[Work]:
    """Every client's round, from its own data. Raises UserError if tokenizer or data cannot be had."""
    tokenizer = load_tokenizer(settings.model)
    examples = load_examples(settings.data, tokenizer, settings.seed).train
    parts = partition(examples, settings.data.partition, settings.clients.count, settings.seed)
    tokens = tokenize(examples, tokenizer, settings.data, "train")
    return [
        client_work(settings, f"client-{index}", index % len(settings.tiers.budgets), [tokens[i] for i in part])
        for index, part in enumerate(parts)
    ]


def assumed_work(settings: RunSettings, examples: int) -> list[Work]:
    """Every client's round if it has an even share of so many examples, as long as data.max_length allows."""
    train, count = settings.train, settings.clients.count
    if examples < count:
        raise ConfigError(
            f"--examples {examples} leaves some of the {count} clients without any; expected {count} or more"
        )
    share = examples // count
    tokens = train.batch_size * settings.data.max_length
    batch = Batch(train.batch_size, settings.data.max_length, tokens, tokens)
    passes = steps_per_round(train, share) * train.gradient_accumulation
    return [_assumed(settings, index, share, [batch] * passes) for index in range(count)]


def _assumed(settings: RunSettings, index: int, share: int, passes: list[Batch]) -> Work:
    return Work(f"client-{index}", index % len(settings.tiers.budgets), share, passes, passes[0])


def client_work(settings: RunSettings, client: str, tier: int, examples: Sequence[Tokens]) -> Work:
    """A client's first round on its own examples, which stands for all of its rounds."""
    train = settings.train
    order = batch_order(train, examples, generator_for(settings.seed, client, 1, "batches"))
    passes = steps_per_round(train, len(examples)) * train.gradient_accumulation
    whole = settings.data.loss_on_prompt
    seen = [batch_shape([examples[i] for i in next(order)], whole) for _ in range(passes)]
    longest = batch_shape(sorted(examples, key=lambda one: len(one.input_ids))[-train.batch_size :], whole)
    most = sum(sorted(_labels(one, whole) for one in examples)[-train.batch_size :])
    return Work(client, tier, len(examples), seen, replace(longest, labelled=most))


def batch_shape(examples: Sequence[Tokens], loss_on_prompt: bool = False) -> Batch:
    """The shape of these examples, collated."""
    labelled = sum(_labels(one, loss_on_prompt) for one in examples)
    lengths = [len(one.input_ids) for one in examples]
    return Batch(len(examples), max(lengths), sum(lengths), labelled)


def _labels(one: Tokens, loss_on_prompt: bool) -> int:
    """Positions whose next token has a label; the first token of a text has none before it."""
    return len(one.input_ids) - (1 if loss_on_prompt else one.prompt_length)
