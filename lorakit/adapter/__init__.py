"""An adapter: its config, its modules and what each of its tensors does to a base."""
