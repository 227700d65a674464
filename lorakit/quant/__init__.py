"""Quantised layouts, one codec a file: arrays of floats to codes and back; no names of models.

`table` has the codecs by name. Law: `quantise` then `dequantise` gives the values that the library
which loads the file computes, bit for bit where that library is bitsandbytes on a CPU.
"""
