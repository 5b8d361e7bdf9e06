"""The README.md of an export: what it is, how to load it, and what plain transformers and PEFT will not do with it."""

from collections.abc import Mapping, Sequence
from typing import Any

_LOAD = {
    "peft": """```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("{base}", dtype="{dtype}", num_experts_per_tok={top_k})
model = PeftModel.from_pretrained(base, "FOLDER")
```""",
    "merged": """```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("FOLDER", dtype="{dtype}")
```""",
    "native": "Only ubsmoe reads this format.",
}


def export_card(facts: Mapping[str, Any], missing: Sequence[str]) -> str:
    """Word the card.

    Args:
        facts: what the sidecar says.
        missing: sentences on what plain transformers and PEFT cannot express of this export.
    """
    tier = f"tier {facts['tier']} of its run" if facts["tier"] else "no tier of a run"
    load = _LOAD[facts["format"]].format_map(facts)
    lines = "\n".join(f"- {sentence}" for sentence in missing)
    left = f"It leaves out:\n\n{lines}" if missing else "It then does exactly what was trained; nothing is left out."
    if facts["format"] == "native":
        left = ""
    return f"""---
base_model: {facts["base"]}
library_name: {"peft" if facts["format"] == "peft" else "transformers"}
tags: [mixture-of-experts, federated-learning, ubsmoe]
---

# {facts["format"]} export of a federated fine-tuning run

| | |
|---|---|
| base | {facts["base"]} ({facts["family"]}, {facts["dtype"]}) |
| SHA-256 of its weights | {facts["base_sha256"]} |
| method | {facts["method"]}, {tier} |
| K | {facts["top_k"]} of at most {facts["k_max"]} experts per token |
| LoRA | rank {facts["rank"]}, alpha {facts["alpha"]:g} |

## With plain transformers or PEFT

{load}

{left}

## With ubsmoe

Everything, φ and output scale included, at this K or any other:

```python
from ubsmoe import FederatedMoE

model = FederatedMoE.from_pretrained("FOLDER")
print(model.generate("...", max_new_tokens=32))
```
"""
