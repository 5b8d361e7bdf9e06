"""What a run file can say, section by section: frozen, validated settings.

Defaults live here, those of [data] in data.py, those of [model], [adapter] and [tiers] in model.py, and nowhere else.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, field_validator, model_validator

from ubsmoe.config.data import DataSettings
from ubsmoe.config.model import AdapterSettings, ModelSettings, TierSettings
from ubsmoe.config.plug_ins import OrPlugIn, plug_in
from ubsmoe.config.section import Settings, Share
from ubsmoe.config.secure import SecureAggregationSettings, conflict_with_secure
from ubsmoe.costs.workload import WireDtype


class ClientSettings(Settings):
    """[clients]: who takes part. Client i belongs to tier i mod the number of tiers."""

    count: PositiveInt = Field(8, description="number of clients")
    per_round: PositiveInt | None = Field(None, description="clients drawn each round; all when left out")
    sampling: Annotated[Literal["fixed", "poisson"], OrPlugIn()] = Field(
        "fixed",
        description="exactly per_round clients, or each with probability per_round / count (better for [privacy]), or a plug-in",
    )
    max_weight: Annotated[float, Field(ge=1)] = Field(
        16.0,  # measured: docs/robustness.md, What a client may weigh
        description="a client weighs at most so many times the clients' median number of examples, whatever it announces; "
        "under [secure_aggregation] one with more takes no part",
    )


class MethodSettings(BaseModel):
    """[method]: the federated method by name; the other keys are the method's own settings."""

    model_config = ConfigDict(frozen=True, extra="allow")
    name: str = "ubsmoe"

    @property
    def settings(self) -> dict[str, Any]:
        """The method's own settings, for its builder."""
        return dict(self.model_extra or {})


class TrainSettings(Settings):
    """[train]: rounds and the local optimiser."""

    rounds: PositiveInt = Field(10, description="communication rounds")
    local_steps: PositiveInt | None = Field(None, description="optimiser steps per client and round; else local_epochs")
    local_epochs: PositiveFloat = Field(1.0, description="passes over the client's data per round")
    batch_size: PositiveInt = Field(16, description="examples per forward pass")
    gradient_accumulation: PositiveInt = Field(1, description="forward passes per optimiser step")
    micro_batch: PositiveInt | None = Field(
        None,
        description="examples at a time of a batch, which it divides: the same step in less memory; all when left out",
    )
    gradient_checkpointing: bool = Field(
        False,
        description="keep only the input of each layer and run it again in the backward pass: less memory, more time",
    )
    group_by_length: bool = Field(False, description="batches of like lengths: less padding, another order of examples")
    # measured: docs/tables.md, Screening, rows optimizer=sgd
    optimizer: Literal["adamw", "sgd"] = Field("adamw", description="local optimiser; its state is reset every round")
    learning_rate: PositiveFloat = Field(2e-3, description="peak step size")
    lora_plus_ratio: PositiveFloat | None = Field(
        None,
        description="LoRA+: learning rate of B over that of A (PEFT: loraplus_lr_ratio), 16 in its paper; 1 when left out",
    )
    momentum: Share = Field(0.9, description="for sgd")
    weight_decay: Annotated[float, Field(ge=0)] = Field(
        0.0, description="decoupled (adamw) or L2 (sgd); shrinks unused experts too"
    )
    schedule: Annotated[Literal["constant", "linear", "cosine"], OrPlugIn()] = Field(
        "constant", description="how the step size falls to zero over the run, or a plug-in"
    )
    schedule_rounds: PositiveInt | None = Field(
        None,
        description="rounds that the schedule spans; train.rounds when left out, which then cannot change on resume",
    )
    warmup_steps: Annotated[int, Field(ge=0)] = Field(0, description="linear warm-up of each round's local steps")
    clip_norm: PositiveFloat | None = Field(1.0, description="norm of the local gradient (transformers: max_grad_norm)")
    patience: PositiveInt | None = Field(
        None,
        description="stop after so many rounds without a lower validation loss, mean over tiers, and keep the adapter of the "
        "round with the lowest (transformers: early_stopping_patience); needs data.validation_fraction",
    )


class RoundSettings(Settings):
    """[rounds]: when a round ends and what an update must keep to."""

    quorum: Share = Field(0.5, description="share of the round's clients that must count; with fewer the run stops")
    extra_clients: Annotated[int, Field(ge=0)] = Field(
        0, description="clients asked beyond clients.per_round; the first to answer count"
    )
    deadline_seconds: PositiveFloat | None = Field(
        None, description="later answers do not count; none when left out (in one process: the clock of [simulation])"
    )
    give_up_seconds: PositiveFloat = Field(
        7200.0, description="real seconds after which a node or worker process that says nothing is given up"
    )
    max_change: PositiveFloat = Field(
        1.0, description="root mean square by which a client may change its weights; an update with more is dropped"
    )
    max_ratio: Annotated[float, Field(gt=1)] | None = Field(
        8.0,  # measured: docs/robustness.md, What changes too much
        description="an update with a tensor that changed more than so many times the clients' median is dropped; "
        "nobody is judged by others where [privacy] or [secure_aggregation] is on",
    )

    @property
    def longest_wait(self) -> tuple[float, str]:
        """Seconds that a client has on Flower, whose clock is the real one, and the setting that says so."""
        ends = [(self.give_up_seconds, "rounds.give_up_seconds"), (self.deadline_seconds, "rounds.deadline_seconds")]
        return min((seconds, name) for seconds, name in ends if seconds is not None)


class WireSettings(Settings):
    """[wire]: how updates travel. A task goes down in float32, since every client starts from it."""

    dtype: WireDtype = Field(
        "float32",
        description="precision of a client's change; only the experts it touched travel, float32 loses nothing",
    )


class RobustSettings(Settings):
    """[robust]: aggregation that is robust to malicious (Byzantine) clients (docs/robustness.md)."""

    rule: Literal["mean", "trimmed_mean", "median", "multi_krum"] = Field(
        "mean", description="how updates are averaged; all but mean hold every update of a round at once"
    )
    attackers: Annotated[int, Field(ge=0)] = Field(
        0, description="malicious clients per round that the rule must tolerate, for trimmed_mean and multi_krum"
    )
    clip_norm: PositiveFloat | None = Field(
        None, description="largest norm of a client's change of weights; a larger one is scaled down, not dropped"
    )
    utilization_cap: Annotated[float, Field(ge=1)] | None = Field(
        None, description="factor by which a client's share of an expert may differ from the clients' median"
    )

    @model_validator(mode="after")
    def _rule_has_its_number(self) -> "RobustSettings":
        if (self.rule in ("trimmed_mean", "multi_krum")) != (self.attackers > 0):
            raise ValueError(
                f"attackers is {self.attackers} with rule {self.rule!r}; trimmed_mean and multi_krum need at least 1, "
                "mean and median take none"
            )
        return self

    @property
    def fewest_clients(self) -> int:
        """How many updates the rule needs at least."""
        return {"trimmed_mean": 2 * self.attackers + 1, "multi_krum": 2 * self.attackers + 3}.get(self.rule, 1)


class PrivacySettings(Settings):
    """[privacy]: client-level differential privacy (docs/robustness.md); off when the section is left out."""

    noise_multiplier: PositiveFloat = Field(
        description="standard deviation of the noise on a round's sum, in units of clip_norm"
    )
    clip_norm: PositiveFloat = Field(description="longest contribution of a client, weights and counts together")
    delta: Annotated[float, Field(gt=0, lt=1)] = Field(1e-5, description="of (epsilon, delta); below 1 / clients.count")
    seed: int | None = Field(
        None, description="fixes the noise, for studies: who knows it can subtract the noise; secret when left out"
    )


class SimulationSettings(Settings):
    """[simulation]: unequal clients on a virtual clock, in this process; off when the section is left out."""

    flops_per_second: PositiveFloat = Field(1e12, description="speed at budget 1; a budget of beta has beta of it")
    speed_spread: Annotated[float, Field(ge=0)] = Field(
        0.0, description="standard deviation of the log of a client's speed, drawn once per client"
    )
    dropout: Share = Field(0.0, description="probability that a client does not answer in a round")


class EvaluateSettings(Settings):
    """[evaluate]: every tier at its own K, on the same examples."""

    every: Annotated[int, Field(ge=0)] = Field(0, description="evaluate after every N rounds; 0: before and after only")
    before: bool = Field(True, description="also before round 1: alike for all methods, a sixth of a short run's time")
    after: bool = Field(
        True, description="also after the last round; a Flower server that never evaluates loads no weights"
    )
    max_examples: PositiveInt | None = Field(None, description="examples per task; all when left out")
    batch_size: PositiveInt = Field(64, description="examples per forward pass")
    decoding: Literal["greedy", "beam"] = Field(
        "greedy", description="greedy stops at the first label; beam is the paper's"
    )
    num_beams: PositiveInt = Field(4, description="for beam")
    max_new_tokens: PositiveInt = Field(32, description="longest answer")
    mc_accuracy: bool = Field(True, description="also rank the candidate answers by likelihood")
    metrics: tuple[str, ...] = Field((), description="plug-ins that give numbers for a generated answer")

    @field_validator("metrics")
    @classmethod
    def _are_plug_ins(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if plug_in(name) is None:
                raise ValueError(f'expected plug-ins such as "module:function", got {name!r}')
        return names


class RunSettings(Settings):
    """A whole run file."""

    seed: int = Field(0, description="every random choice follows from it")
    label: str | None = Field(None, description="name in tables and figures; the method and its settings when left out")
    threads: PositiveInt | None = Field(
        None, le=1024, description="torch threads; results are bitwise equal only at equal threads"
    )
    keep_checkpoints: PositiveInt = Field(
        2, description="newest states kept (transformers: save_total_limit); `ubsmoe study alignment` reads them"
    )
    model: ModelSettings = ModelSettings()
    adapter: AdapterSettings = AdapterSettings()
    tiers: TierSettings = TierSettings()
    clients: ClientSettings = ClientSettings()
    data: DataSettings = DataSettings()
    method: MethodSettings = MethodSettings()
    train: TrainSettings = TrainSettings()
    rounds: RoundSettings = RoundSettings()
    wire: WireSettings = WireSettings()
    robust: RobustSettings = RobustSettings()
    privacy: PrivacySettings | None = None
    secure_aggregation: SecureAggregationSettings | None = None
    simulation: SimulationSettings | None = None
    evaluate: EvaluateSettings = EvaluateSettings()

    @model_validator(mode="after")
    def _consistent(self) -> "RunSettings":
        if self.clients.per_round and self.clients.per_round > self.clients.count:
            raise ValueError(
                f"clients.per_round is {self.clients.per_round} but there are only {self.clients.count} clients; "
                "lower per_round or raise clients.count"
            )
        if self.rounds.extra_clients and not self.clients.per_round:
            raise ValueError(
                f"rounds.extra_clients is {self.rounds.extra_clients}, but every client is asked in every round; "
                "set clients.per_round"
            )
        if self.clients.sampling == "poisson" and (not self.clients.per_round or self.rounds.extra_clients):
            raise ValueError(
                'clients.sampling "poisson" draws clients.per_round clients on average; set that, and rounds.extra_clients = 0'
            )
        if self.privacy and plug_in(self.clients.sampling):
            raise ValueError('[privacy] reckons epsilon for clients.sampling "fixed" or "poisson"; choose one of them')
        if self.privacy and (self.robust != RobustSettings() or self.rounds.extra_clients):
            raise ValueError(
                "[privacy] bounds what one client can do to a mean, which [robust] and rounds.extra_clients do not average; "
                "leave them out"
            )
        if (self.train.patience is None) != (self.data.validation_fraction is None):
            raise ValueError(
                f"train.patience is {self.train.patience} and data.validation_fraction {self.data.validation_fraction}; early "
                "stopping takes both, such as 3 and 0.1; set both, or neither"
            )
        if self.secure_aggregation and (reason := conflict_with_secure(self)):
            raise ValueError(reason)
        for size in (self.train.micro_batch, *(self.tiers.micro_batch or ())):
            if size and self.train.batch_size % size:
                raise ValueError(
                    f"micro_batch is {size}, which does not divide train.batch_size = {self.train.batch_size}; a step is to be "
                    f"the same work in equal pieces, so set one of {', '.join(map(str, _divisors(self.train.batch_size)))}"
                )
        if self.clients_per_round < self.robust.fewest_clients:
            raise ValueError(
                f"robust.rule {self.robust.rule!r} against {self.robust.attackers} attackers needs "
                f"{self.robust.fewest_clients} clients in a round, there are {self.clients_per_round}; lower robust.attackers"
            )
        return self

    @property
    def clients_per_round(self) -> int:
        """How many clients a round is for."""
        return self.clients.per_round or self.clients.count


def train_of_tier(train: TrainSettings, tiers: TierSettings, tier: int) -> TrainSettings:
    """[train] as clients of a tier carry it out: the same work, in pieces and with a memory of their own."""
    own = {key: getattr(tiers, key) for key in ("micro_batch", "gradient_checkpointing")}
    return train.model_copy(update={key: values[tier] for key, values in own.items() if values is not None})


def _divisors(number: int) -> list[int]:
    return [count for count in range(1, number + 1) if number % count == 0]
