"""LoRA files of any format, read into one form and written from it."""
