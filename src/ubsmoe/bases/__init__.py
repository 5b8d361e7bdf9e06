"""Making a base model: upcycle a dense one, or pretrain a small one."""
