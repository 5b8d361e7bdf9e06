"""What decides a base, but for the text of the corpus."""

from pathlib import Path

from pydantic import Field, model_validator

from ubsmoe.config import Settings, read_toml, validated


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
    num_entities: int = Field(96, ge=8, description="entities of the synthetic QA data set")
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
