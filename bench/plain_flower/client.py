"""A client as one writes it: load the base, put the adapter on, train, send the adapter back."""

from common import load, read_job, set_top_k, train
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from peft import get_peft_model_state_dict, set_peft_model_state_dict

app = ClientApp()


@app.train()
def train_on_message(message: Message, context: Context) -> Message:
    """One round."""
    job = read_job(str(context.run_config["job"]))
    number = int(context.node_config["partition-id"])
    client, model = job["clients"][number], load(job)
    set_peft_model_state_dict(model, message.content.array_records["arrays"].to_torch_state_dict())
    set_top_k(model, client["top_k"])
    loss = train(model, client["examples"], job["train"], job["seed"] + number)
    metrics = MetricRecord({"loss": loss, "num-examples": len(client["examples"])})
    record = RecordDict({"arrays": ArrayRecord(get_peft_model_state_dict(model)), "metrics": metrics})
    return Message(record, reply_to=message)
