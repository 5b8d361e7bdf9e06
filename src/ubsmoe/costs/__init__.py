"""What a run costs, counted from a model's shape: FLOPs, memory, bytes. No tensors and no weights."""
