"""What adapters do to the tensors of a base: what several verbs, and live models, start from."""
