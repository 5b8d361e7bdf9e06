"""What flwr's own FedAvg makes of the same bad replies."""

import os
from typing import Any

from fault_cases.replies import FIFTEEN
from fault_cases.round_of_five import Round, opened
from ubsmoe.wire.codec import Packed


def in_flower(world: Round) -> dict[str, str] | None:
    """The same 15 replies in flwr's FedAvg: contained, corrupt, accepted in a wrong dtype, or the run stops."""
    os.environ |= {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
    try:
        import numpy as np
        from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
        from flwr.serverapp.strategy import FedAvg
        from flwr.supercore.task_identity import TaskIdentity
    except ImportError:
        return None
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1

    def reply(packed: Packed) -> Any:
        fields, found = opened(packed)
        arrays = {name: Array(value.numpy()) for name, value in found.items() if name.startswith("adapters.")}
        metrics = {"num-examples": fields["num_examples"]} | {k: fields[k] for k in ("accuracy",) if k in fields}
        asked = Message(RecordDict(), dst_node_id=2, message_type="train")
        return Message(RecordDict({"a": ArrayRecord(arrays), "m": MetricRecord(metrics)}), reply_to=asked)

    def mean(packed: list[Packed]) -> dict[str, Any] | None:
        arrays, _ = FedAvg().aggregate_train(1, [reply(one) for one in packed])
        return None if arrays is None else {name: array.numpy() for name, array in arrays.items()}

    good = [world.encode(update) for update in world.honest]
    four = mean(good[:-1])
    assert four is not None
    outcomes = {}
    for name, spoil in FIFTEEN.items():
        try:
            got = mean([*good[:-1], spoil(good[-1])])
        except Exception as error:
            outcomes[name] = f"run stops ({type(error).__name__})"
            continue
        if got is None or got.keys() != four.keys():
            outcomes[name] = "run stops (no result)" if got is None else "corrupt"
        elif all(np.array_equal(got[key], four[key]) for key in four):
            outcomes[name] = "contained"
        else:
            wild = any(
                not np.isfinite(v).all() or v.shape != four[k].shape or np.abs(v - four[k]).max() > 1
                for k, v in got.items()
            )
            other = any(value.dtype != four[key].dtype for key, value in got.items())
            outcomes[name] = "corrupt" if wild else "accepted, wrong dtype" if other else "in the mean"
    return outcomes
