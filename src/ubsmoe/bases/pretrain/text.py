"""What a base reads: books, sentences and questions of a synthetic QA data set, and the tokenizer made from them."""

import gzip
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from ubsmoe.bases.pretrain.settings import PretrainSettings
from ubsmoe.config import ConfigError
from ubsmoe.data.prompts import plain
from ubsmoe.data.synthetic import SyntheticQA
from ubsmoe.data.tasks import Example

END = "<|endoftext|>"
HELD_OUT = 2000  # characters at the end of every book that are kept for measuring
IGNORED = -100  # the label of tokens that carry no loss


def read_corpus(folder: Path) -> list[str]:
    """The text of every .txt and .txt.gz file of a folder, in the order of their names."""
    files = sorted(p for p in Path(folder).iterdir() if p.name.endswith((".txt", ".txt.gz")))
    if not files:
        raise ConfigError(f"--corpus must be a folder with .txt or .txt.gz files, found none in {folder}")
    return [
        (gzip.decompress(p.read_bytes()) if p.suffix == ".gz" else p.read_bytes()).decode("utf-8", errors="replace")
        for p in files
    ]


def train_tokenizer(books: list[str], vocab_size: int, rng: random.Random) -> PreTrainedTokenizerFast:
    """A byte-level BPE of books and questions, digits apart so that "answer2" and "Answer2:" share their 2.

    Names come from a hundred data sets of both families: a name alone tells no fact, and every syllable gets its token.
    """
    text = [book[:400_000].replace(END, "\n") for book in books]
    for seed in range(100):
        synthetic = SyntheticQA(1000 + seed, 200, "pretraining" if seed % 2 else "evaluation")
        text.append(" ".join(synthetic.sentences(rng)[:250]))
        text += [plain(e.prompt) + e.completion for e in synthetic.examples("train", 100, seed=0)]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        text,
        trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END, pad_token=END, model_max_length=1024)


class Stream:
    """Endless batches of questions and of prose, all drawn from one seeded generator."""

    def __init__(
        self, settings: PretrainSettings, books: list[str], tokenizer: PreTrainedTokenizerFast, synthetic: SyntheticQA
    ) -> None:
        self.settings, self.tokenizer, self.synthetic, self.books = settings, tokenizer, synthetic, books
        self.rng = random.Random(f"stream {settings.seed}")
        self.queue: list[Example] = []
        self.draws = 0
        self.leftover: list[int] = []

    def questions(self) -> tuple[Tensor, Tensor]:
        """Token ids and labels of one step's questions, padded on the right; labels on the answers only."""
        count = self.settings.questions_per_step
        if len(self.queue) < count:
            self.queue += self.synthetic.examples("train", 4000, seed=self.draws)
            self.draws += 1
        taken, self.queue = self.queue[:count], self.queue[count:]
        return collate([encode(self.tokenizer, e.prompt, e.completion) for e in taken])

    def prose(self) -> tuple[Tensor, Tensor]:
        """Packed sequences of prose; every token is a label."""
        wanted = self.settings.prose_per_step * self.settings.prose_tokens
        while len(self.leftover) < wanted:
            self.leftover += [*self.tokenizer(self._passage()).input_ids, self.tokenizer.eos_token_id]
        ids, self.leftover = torch.tensor(self.leftover[:wanted]), self.leftover[wanted:]
        return ids.view(self.settings.prose_per_step, -1), ids.view(self.settings.prose_per_step, -1)

    def _passage(self) -> str:
        """A piece of a book or a handful of the data set's facts."""
        if self.rng.random() < self.settings.book_share:
            book = self.rng.choice(self.books)
            start = self.rng.randrange(max(1, len(book) - HELD_OUT - 1200))
            return book[start : start + 1200].replace(END, "\n")
        return " ".join(self.synthetic.sentences(self.rng)[:20])


def encode(tokenizer: PreTrainedTokenizerFast, prompt: str, completion: str) -> tuple[list[int], list[int]]:
    """Ids of a templated prompt and of its completion with the end token."""
    return tokenizer(plain(prompt)).input_ids, [*tokenizer(completion).input_ids, tokenizer.eos_token_id]


def collate(pairs: list[tuple[list[int], list[int]]]) -> tuple[Tensor, Tensor]:
    """Ids and labels as rectangles: the end token (id 0) and IGNORED fill up the right side."""
    length = max(len(prompt) + len(answer) for prompt, answer in pairs)
    ids = torch.zeros(len(pairs), length, dtype=torch.long)
    labels = torch.full_like(ids, IGNORED)
    for row, (prompt, answer) in enumerate(pairs):
        end = len(prompt) + len(answer)
        ids[row, :end] = torch.tensor(prompt + answer)
        labels[row, len(prompt) : end] = torch.tensor(answer)
    return ids, labels


def real_tokens(ids: Tensor, labels: Tensor) -> Tensor:
    """Which tokens of a batch are not padding, flattened: an end token counts only where it is a label."""
    return ((ids != 0) | (labels != IGNORED)).reshape(-1)
