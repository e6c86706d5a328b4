r"""Language models under a posterior: perplexity, generation and decoding, token by token.

A model is anything that maps tokens (batch, tokens) to logits (batch, tokens, vocabulary), or to an
object with ``.logits``: position t scores token t + 1. The shift is made here, and what is returned
stands where its token stands.

Source: Shen et al. 2024, arXiv 2402.17641; Daheim et al. 2025, arXiv 2503.05318.
"""

from .decoding import Choice, mbr, token_f1
from .generation import Generation, candidates, generate
from .scoring import Perplexity, perplexity

__all__ = [
    "Choice",
    "Generation",
    "Perplexity",
    "candidates",
    "generate",
    "mbr",
    "perplexity",
    "token_f1",
]
