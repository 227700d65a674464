"""Names and tables of adapter files; no tensors."""
