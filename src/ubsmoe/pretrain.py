"""Pretraining of the small base that ships with the library: a sparse mixture of experts taught by books and a world.

What it learns is a skill, not the facts it will be asked: to gather a name and a relation, recall the fact and answer
in the formats of Commonsense-15K. Its text tells of a `pretraining` world, whose names never occur in an `evaluation`
world (see `data/world.py`). Two streams are mixed in every step: questions with their answers, the loss on the answer
alone; and prose, books and sentences that state the world's facts, packed end to end.

Training is plain top-K with a load-balancing and a z-loss per layer, so the base is a stock mixture of experts: it
was never taught to get by with fewer active experts.
"""

import contextlib
import copy
import gzip
import json
import math
import random
import shutil
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, model_validator
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, silu
from transformers import OlmoeConfig, OlmoeForCausalLM, PreTrainedTokenizerFast
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from ubsmoe.config import ConfigError, Settings, read_toml, validated
from ubsmoe.data.prompts import plain
from ubsmoe.data.tasks import Example
from ubsmoe.data.world import World
from ubsmoe.maths.balance import load_balancing_loss, normalised_entropy, z_loss

END = "<|endoftext|>"
HELD_OUT = 2000  # characters at the end of every book that are kept for measuring
MEASURED = 640  # questions behind every accuracy
IGNORED = -100  # the label of tokens that carry no loss


class PretrainSettings(Settings):
    """Everything that decides the base, but for the text of the corpus. Counts are in steps, questions or tokens."""

    seed: int = 0
    vocab_size: int = Field(4096, ge=300)
    hidden_size: int = Field(128, ge=8)
    expert_width: int = Field(128, ge=4)
    num_layers: int = Field(4, ge=1)
    num_heads: int = Field(4, ge=1)
    num_experts: int = Field(32, ge=2)
    top_k: int = Field(8, ge=1)
    initializer_range: float = Field(0.05, gt=0)
    steps: int = Field(1000, ge=1)
    questions_per_step: int = Field(16, ge=1)
    question_weight: float = Field(5.0, gt=0, description="of the answers' loss; all other text weighs 1")
    prose_per_step: int = Field(2, ge=1, description="packed sequences of prose")
    prose_tokens: int = Field(256, ge=16)
    learning_rate: float = Field(2e-3, gt=0)
    final_rate_fraction: float = Field(0.1, ge=0, le=1)
    warmup_steps: int = Field(50, ge=0)
    weight_decay: float = Field(0.01, ge=0)
    balance_coefficient: float = Field(0.01, ge=0)
    z_coefficient: float = Field(0.001, ge=0)
    num_entities: int = Field(96, ge=8, description="entities of the pretraining world")
    book_share: float = Field(0.5, ge=0, le=1, description="prose from books")
    report_every: int = Field(200, ge=1)
    bf16: bool = True

    @model_validator(mode="after")
    def _consistent(self) -> "PretrainSettings":
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k is {self.top_k}, but there are only {self.num_experts} experts")
        if self.hidden_size % (2 * self.num_heads):
            raise ValueError(
                f"hidden_size must be an even multiple of num_heads = {self.num_heads}, got {self.hidden_size}"
            )
        return self


def load_pretrain(path: Path) -> PretrainSettings:
    """Settings from a TOML file. Raises ConfigError, naming it, for an unknown or impossible one."""
    return validated(PretrainSettings, read_toml(path))


# ---- text --------------------------------------------------------------------------------------------------


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

    Names come from a hundred worlds of both families: a name alone tells no fact, and every syllable gets its token.
    """
    text = [book[:400_000].replace(END, "\n") for book in books]
    for seed in range(100):
        world = World(1000 + seed, 200, "pretraining" if seed % 2 else "evaluation")
        text.append(" ".join(world.sentences(rng)[:250]))
        text += [plain(e.prompt) + e.completion for e in world.examples("train", 100, seed=0)]
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
        self, settings: PretrainSettings, books: list[str], tokenizer: PreTrainedTokenizerFast, world: World
    ) -> None:
        self.settings, self.tokenizer, self.world, self.books = settings, tokenizer, world, books
        self.rng = random.Random(f"stream {settings.seed}")
        self.queue: list[Example] = []
        self.draws = 0
        self.leftover: list[int] = []

    def questions(self) -> tuple[Tensor, Tensor]:
        """Token ids and labels of one step's questions, padded on the right; labels on the answers only."""
        count = self.settings.questions_per_step
        if len(self.queue) < count:
            self.queue += self.world.examples("train", 4000, seed=self.draws)
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
        """A piece of a book or a handful of the world's facts."""
        if self.rng.random() < self.settings.book_share:
            book = self.rng.choice(self.books)
            start = self.rng.randrange(max(1, len(book) - HELD_OUT - 1200))
            return book[start : start + 1200].replace(END, "\n")
        return " ".join(self.world.sentences(self.rng)[:20])


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


# ---- model -------------------------------------------------------------------------------------------------


def build_model(settings: PretrainSettings, vocab_size: int) -> OlmoeForCausalLM:
    """A fresh OLMoE of the wanted size, its weights drawn from the settings' seed."""
    config = OlmoeConfig(
        vocab_size=vocab_size,
        hidden_size=settings.hidden_size,
        intermediate_size=settings.expert_width,
        num_hidden_layers=settings.num_layers,
        num_attention_heads=settings.num_heads,
        num_key_value_heads=settings.num_heads,
        num_experts=settings.num_experts,
        num_experts_per_tok=settings.top_k,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        norm_topk_prob=False,
        initializer_range=settings.initializer_range,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        model = OlmoeForCausalLM(config)
    with torch.no_grad():
        # Gate weights are near 1/M at first: without this the experts are almost silent and learn late.
        for layer in model.model.layers:
            layer.mlp.experts.down_proj.mul_(settings.num_experts / 4)
    # The plain kernel is faster than the fused one on short sequences, on the CPUs we measured.
    model.set_attn_implementation("eager")
    return model


class RouterLog:
    """Remembers what each layer's router said since last asked: (logits, chosen experts) per layer and pass."""

    def __init__(self, model: OlmoeForCausalLM) -> None:
        self.layers: list[tuple[Tensor, Tensor]] = []
        self.hooks = [layer.mlp.gate.register_forward_hook(self._remember) for layer in model.model.layers]

    def _remember(self, _gate: nn.Module, _inputs: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
        self.layers.append((output[0], output[2]))

    def close(self) -> None:
        """Stop listening."""
        for hook in self.hooks:
            hook.remove()

    def penalty(self, settings: PretrainSettings, mask_T: Tensor) -> Tensor:
        """Load balancing and z-loss, averaged over layers; forgets what it has seen."""
        layers, self.layers = self.layers, []
        balance = [load_balancing_loss(logits.float().softmax(-1), index, mask_T) for logits, index in layers]
        size = [z_loss(logits, mask_T) for logits, _ in layers]
        return (
            settings.balance_coefficient * torch.stack(balance).mean()
            + settings.z_coefficient * torch.stack(size).mean()
        )


def block_experts(experts: Any, hidden_TD: Tensor, index_TK: Tensor, weights_TK: Tensor, block: int = 96) -> Tensor:
    """Run the chosen experts in equal blocks of tokens: one batched product, whatever the imbalance between experts.

    The slots are sorted by expert and padded to whole blocks, so a block has one owner. The stock implementations
    loop over experts or change shape at every step; in bfloat16 on CPUs this one was up to 1.7 times faster, with the
    same result.
    """
    num_tokens, top_k = index_TK.shape
    chosen, order = index_TK.reshape(-1).sort(stable=True)
    counts = torch.bincount(chosen, minlength=experts.num_experts)
    blocks = (counts + block - 1) // block
    first_slot, first_place = counts.cumsum(0) - counts, (blocks.cumsum(0) - blocks) * block
    place = first_place[chosen] + torch.arange(len(chosen)) - first_slot[chosen]
    token = torch.full((int(blocks.sum()) * block,), num_tokens)  # one past the end: the row of zeros that pads
    token[place] = order // top_k
    weight = weights_TK.new_zeros(len(token)).index_put((place,), weights_TK.reshape(-1)[order])
    owner = torch.repeat_interleave(torch.arange(experts.num_experts), blocks)
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else hidden_TD.dtype
    up, down = (matrix.to(dtype)[owner].transpose(1, 2) for matrix in (experts.gate_up_proj, experts.down_proj))
    padded = torch.cat([hidden_TD, hidden_TD.new_zeros(1, hidden_TD.shape[1])]).to(dtype)
    gate, value = (padded.index_select(0, token).view(len(owner), block, -1) @ up).chunk(2, dim=-1)
    output = ((silu(gate) * value) @ down).flatten(0, 1).float() * weight[:, None]
    return torch.zeros(padded.shape).index_add(0, token, output)[:num_tokens].to(hidden_TD.dtype)


# ---- training ----------------------------------------------------------------------------------------------


def losses(model: OlmoeForCausalLM, ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean loss over the labelled tokens, and over the others that are no padding (0 if there are none)."""
    real, labelled = real_tokens(ids, labels).view_as(ids)[:, 1:], labels[:, 1:] != IGNORED
    hidden = model.model(input_ids=ids).last_hidden_state[:, :-1]
    each = cross_entropy(model.lm_head(hidden[real]).float(), ids[:, 1:][real], reduction="none")
    answer = labelled[real]
    return each[answer].mean(), each[~answer].sum() / (~answer).sum().clamp_min(1)


def real_tokens(ids: Tensor, labels: Tensor) -> Tensor:
    """Which tokens of a batch are not padding, flattened: an end token counts only where it is a label."""
    return ((ids != 0) | (labels != IGNORED)).reshape(-1)


def rate_at(step: int, settings: PretrainSettings) -> float:
    """Learning rate of a step (from 0): linear warm-up, then a cosine down to a fraction of the peak."""
    warm = min(1.0, (step + 1) / max(1, settings.warmup_steps))
    cosine = (1 + math.cos(math.pi * step / settings.steps)) / 2
    floor = settings.final_rate_fraction
    return settings.learning_rate * warm * (floor + (1 - floor) * cosine)


def train(model: OlmoeForCausalLM, stream: Stream, settings: PretrainSettings) -> Iterator[dict[str, float]]:
    """Train the model in place; yields a progress record every `report_every` steps and at the end."""
    router = RouterLog(model)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.95), weight_decay=settings.weight_decay
    )
    sums: dict[str, float] = defaultdict(float)
    tokens, begun, since = 0, time.perf_counter(), 0
    model.train()
    for step in range(settings.steps):
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step, settings)
        for name, weight in (("questions", settings.question_weight), ("prose", 1.0)):
            ids, labels = getattr(stream, name)()
            with torch.autocast("cpu", torch.bfloat16) if settings.bf16 else contextlib.nullcontext():
                loss, rest = losses(model, ids, labels)
            (weight * loss + rest + router.penalty(settings, real_tokens(ids, labels))).backward()
            sums[name] += float(loss.detach())
            tokens += ids.numel()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        since += 1
        if (step + 1) % settings.report_every == 0 or step + 1 == settings.steps:
            seconds = time.perf_counter() - begun
            means = {f"{name}_loss": round(total / since, 4) for name, total in sums.items()}
            yield {"step": step + 1, "tokens": tokens, "seconds": round(seconds, 1), **means}
            sums.clear()
            since = 0
    router.close()


# ---- measuring ---------------------------------------------------------------------------------------------


@torch.no_grad()
def accuracy(model: OlmoeForCausalLM, tokenizer: PreTrainedTokenizerFast, examples: list[Example]) -> dict[str, float]:
    """Per task, the share of questions whose whole completion greedy decoding would write, and their "mean".

    One pass with the right completion in place suffices: decoding writes it exactly if every token of it is the
    likeliest.
    """
    right: dict[str, list[float]] = defaultdict(list)
    for start in range(0, len(examples), 64):
        batch = examples[start : start + 64]
        ids, labels = collate([encode(tokenizer, e.prompt, e.completion) for e in batch])
        guess, wanted = model(input_ids=ids).logits[:, :-1].argmax(-1), labels[:, 1:]
        for example, ok in zip(batch, ((guess == wanted) | (wanted == IGNORED)).all(-1).tolist(), strict=True):
            right[example.task].append(float(ok))
    by_task = {task: sum(values) / len(values) for task, values in sorted(right.items())}
    return {task: round(value, 4) for task, value in {**by_task, "mean": sum(by_task.values()) / len(by_task)}.items()}


@torch.no_grad()
def held_out_loss(model: OlmoeForCausalLM, tokenizer: PreTrainedTokenizerFast, books: list[str], length: int) -> float:
    """Mean loss on the ends of the books, which training never reads."""
    tails = [tokenizer(book[-HELD_OUT:].replace(END, "\n")).input_ids[:length] for book in books]
    ids = torch.tensor([tail for tail in tails if len(tail) == length])
    return float(losses(model, ids, ids)[0]) if len(ids) else math.nan


def utilization_entropy(
    model: OlmoeForCausalLM, tokenizer: PreTrainedTokenizerFast, examples: list[Example]
) -> list[float]:
    """Per layer, how evenly the experts are used on these questions: entropy over its maximum."""
    ids, labels = collate([encode(tokenizer, e.prompt, e.completion) for e in examples])
    real, router = real_tokens(ids, labels), RouterLog(model)
    with torch.no_grad():
        model(input_ids=ids)
    router.close()
    counts = [torch.bincount(index[real].reshape(-1), minlength=logits.shape[-1]) for logits, index in router.layers]
    return [round(float(normalised_entropy(count)), 4) for count in counts]


def measure(
    model: OlmoeForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    books: list[str],
    world: World,
    settings: PretrainSettings,
) -> dict[str, Any]:
    """What the finished base can do, at full and at fewer active experts."""
    known = world.examples("test", MEASURED, seed=1)
    unknown = World(0).examples("test", MEASURED, seed=1)
    gates = [layer.mlp.gate for layer in model.model.layers]
    model.eval()
    results: dict[str, Any] = {
        "pretraining_world": accuracy(model, tokenizer, known),
        "evaluation_world": accuracy(model, tokenizer, unknown),
        "normalised_entropy_per_layer": utilization_entropy(model, tokenizer, known[:128]),
        "by_top_k": {},
    }
    for top_k in sorted({settings.top_k, *(k for k in (6, 4, 2, 1) if k < settings.top_k)}, reverse=True):
        for gate in gates:
            gate.top_k = top_k
        results["by_top_k"][str(top_k)] = {
            "book_loss": round(held_out_loss(model, tokenizer, books, 256), 4),
            "pretraining_world": accuracy(model, tokenizer, known)["mean"],
        }
    for gate in gates:
        gate.top_k = settings.top_k
    return results


# ---- the whole ---------------------------------------------------------------------------------------------


def pretrain(settings: PretrainSettings, corpus_dir: Path, out_dir: Path) -> dict[str, Any]:
    """Make a base from nothing: tokenizer, weights and a record of the training, in a folder `AutoModel` can load.

    The folder is replaced as a whole at every report, so a run that is stopped leaves its latest base, and at the end.

    Args:
        settings: what to train and for how long.
        corpus_dir: a folder of .txt or .txt.gz files.
        out_dir: where the base goes; its `pretraining.json` holds the settings, the progress and the measurements.

    Returns:
        The same record as `pretraining.json`.
    """
    out_dir = Path(out_dir)
    if out_dir.exists() and any(out_dir.iterdir()) and not (out_dir / "pretraining.json").exists():
        raise ConfigError(
            f"--out: {out_dir} holds something that pretraining did not make; expected a new or empty folder"
        )
    books = read_corpus(corpus_dir)
    world = World(settings.seed, settings.num_entities, "pretraining")
    tokenizer = train_tokenizer(books, settings.vocab_size, random.Random(settings.seed))
    model = build_model(settings, len(tokenizer))
    ALL_EXPERTS_FUNCTIONS.register("ubsmoe_blocks", block_experts)
    model.set_experts_implementation("ubsmoe_blocks")
    result: dict[str, Any] = {"settings": settings.model_dump(), "progress": []}
    for record in train(model, Stream(settings, books, tokenizer, world), settings):
        result["progress"].append(record)
        print(json.dumps(record), flush=True)
        save(model, tokenizer, result, Path(out_dir))
    model.to(torch.bfloat16).float()  # measure what is stored, not what was trained
    result |= measure(model, tokenizer, books, world, settings)
    save(model, tokenizer, result, Path(out_dir))
    return result


def save(model: OlmoeForCausalLM, tokenizer: PreTrainedTokenizerFast, record: dict[str, Any], out_dir: Path) -> None:
    """Write the base in bfloat16 beside its place, then move it there; other files of the folder are kept."""
    draft = out_dir.with_name(out_dir.name + ".draft")
    shutil.rmtree(draft, ignore_errors=True)
    if out_dir.exists():
        shutil.copytree(out_dir, draft)
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(draft)
    tokenizer.save_pretrained(draft)
    (draft / "pretraining.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    (draft / "model.safetensors").chmod(0o644)
    shutil.rmtree(out_dir, ignore_errors=True)
    draft.rename(out_dir)
