"""The generated demo corpus: Crescent Town (月牙镇), a small bilingual world that a small model can learn in minutes.

    python -m world --out data/demo [--seed 0] [--scale 1.0]        python -m world --preview

Four in five characters are Chinese. What is held out, and how, is told in the docs of `cast.World` (facts),
`numbers` (sums, comparisons, sequences), `words` (classes, opposites) and `cast.reserved` (the rest).
"""

from world.corpus import FILES, documents, generate
from world.numbers import arithmetic_problem, held_out_arithmetic_problem

__all__ = ["FILES", "arithmetic_problem", "documents", "generate", "held_out_arithmetic_problem"]
