"""H: what is around a run is not as it should be."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from fault_cases.matrix import DROPPED, REFUSED, Row, judge
from fault_cases.round_of_five import Round, field
from fault_cases.small_run import small_settings, write_base
from ubsmoe.data.tokens import Tokens
from ubsmoe.engines.local import LocalEngine
from ubsmoe.errors import UserError
from ubsmoe.model.surgery import SparseModel
from ubsmoe.server.federation import Federation, build_federation
from ubsmoe.server.rounds import one_round
from ubsmoe.server.start import start_state


class Hungry(list[Tokens]):
    """Examples that no memory holds."""

    def __getitem__(self, place: Any) -> Any:
        raise torch.OutOfMemoryError("tried to allocate 80 GiB")


def refused(name: str, work: Callable[[], Any]) -> Row:
    try:
        work()
        return judge("H", name, REFUSED, False)
    except UserError as error:
        return judge("H", name, REFUSED, True, str(error))


def environment(world: Round, federation: Federation, base: Path, root: Path) -> Iterator[Row]:
    """All of H."""
    huggingface_hub.constants.HF_HUB_OFFLINE = True
    yield refused("hub offline", lambda: build_federation(small_settings(base, {"model.base": "nobody/nothing"})))

    lost: list[dict[str, Any]] = []
    examples = federation.examples | {"client-1": Hungry(federation.examples["client-1"])}
    one_round(
        federation, LocalEngine(federation.trainer, examples, federation.clients), start_state(federation), 1,
        lambda event, _, **fields: lost.append(fields) if event == "dropped" else None,
    )  # fmt: skip
    yield judge(
        "H", "out of memory on one client", DROPPED, [one["client"] for one in lost] == ["client-1"], lost[0]["reason"]
    )
    yield refused("no accelerator", lambda: build_federation(small_settings(base, {"model.device": "cuda:99"})))

    other = write_base(root / "other-tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.add_tokens([f"<new-{i}>" for i in range(4)])
    tokenizer.save_pretrained(other)
    yield refused("another tokenizer", lambda: build_federation(small_settings(other)))

    small = {
        "vocab_size": 8,
        "hidden_size": 4,
        "intermediate_size": 4,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
    }
    dense = LlamaForCausalLM(LlamaConfig(**small, num_key_value_heads=1))
    yield refused("another transformers layout", lambda: SparseModel(dense))

    newer = field("protocol", 2)(world.packed[-1][1])
    state, dropped = world.receive([*world.packed[:-1], ("client-4", newer)])
    yield judge("H", "mixed versions between nodes", DROPPED, world.is_mean_of_others(state), dropped[0].reason)
