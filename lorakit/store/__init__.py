"""Bytes: where tensors lie and how they get there. Knows nothing of LoRA."""
