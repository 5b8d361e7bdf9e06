"""The README.md of an export: what it is, how to load it, and what plain transformers and PEFT will not do with it."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ubsmoe.model.load import shipped_path
from ubsmoe.model.presets import HUB_IDS

_LOAD = {
    "peft": """```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained({place}, dtype="{dtype}", num_experts_per_tok={top_k})
model = PeftModel.from_pretrained(base, ".")
```""",
    "merged": """```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(".", dtype="{dtype}")
```""",
    "native": "Only ubsmoe reads this format.",
}


def _place(base: str) -> str:
    """Where plain transformers finds a base, as Python."""
    if shipped_path(base):
        return f'str(files("ubsmoe") / "assets" / "{base}")'
    found = str(Path(base).absolute()) if Path(base).is_dir() else HUB_IDS.get(base, base)
    return json.dumps(found)


def export_card(facts: Mapping[str, Any], missing: Sequence[str]) -> str:
    """Word the card.

    Args:
        facts: what the sidecar says.
        missing: sentences on what plain transformers and PEFT cannot express of this export.
    """
    tier = f"tier {facts['tier']} of its run" if facts["tier"] else "no tier of a run"
    place, alone = _place(facts["base"]), facts["format"] == "merged"
    load = _LOAD[facts["format"]].format_map({**facts, "place": place})
    if "files(" in load:
        load = load.replace("```python\n", "```python\nfrom importlib.resources import files\n\n", 1)
    own = "" if alone or not Path(facts["base"]).is_dir() else f", base={place}"
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

The Python below runs in this folder.

## With plain transformers or PEFT

{load}

{left}

## With ubsmoe

Everything, φ and output scale included, at this K or any other:

```python
from ubsmoe import FederatedMoE

model = FederatedMoE.from_pretrained("."{own})
print(model.generate("...", max_new_tokens=32))
```
"""
