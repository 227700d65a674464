"""From the names of an adapter to the tensors of a base on disk."""
