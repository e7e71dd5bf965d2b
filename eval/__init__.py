"""How systems are evaluated: metrics, their networks, protocol cards, the embedded world's extractors, the report.

from eval import load_card

card = load_card("livetalk")  # what is measured, on which clips, and how
"""

from typing import TYPE_CHECKING

from teachers.lazy import offer

if TYPE_CHECKING:
    from eval.cards import Card, load_card

__all__ = ["Card", "load_card"]
__getattr__, __dir__ = offer(__name__, {"Card": "eval.cards", "load_card": "eval.cards"})
