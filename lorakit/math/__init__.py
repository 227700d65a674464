"""Pure tensor functions: arrays in, arrays out; no names, no files, no globals."""
