"""fp4: floating point of a sign, two bits of exponent and one of fraction, as bitsandbytes has it.

Its levels do not rise with the code: they are those of the bits, divided by the largest, 12. Both
zeros are positive.

Source: bitsandbytes 0.50, bitsandbytes/functional.py (get_4bit_type).
"""

from lorakit.quant.fourbit import FourBit

_MAGNITUDES = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)

FP4 = FourBit("fp4", tuple(sign * m / 12 + 0.0 for sign in (1, -1) for m in _MAGNITUDES))
