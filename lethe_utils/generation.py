"""Tables of what models write and still can: conversations, and utility."""

import pandas as pd

from lethe_utils import tables
from lethe_utils.paper import SETUP

CHATS_CAPTION = (
    "Attacks on conversations; 95 % intervals, Wilson's of shares and normal ones of perplexity "
    "and answer_words (words an answer)."
)


def chat_table(table: pd.DataFrame) -> pd.DataFrame:
    """Attacks on conversations, seeds pooled: model, dataset, attack, seeds, defense, asr, ftr, cda
    (right of the answers that a rule can check), token_accuracy and perplexity (of all reference
    answers), answer_words and repetition (of the answers to clean rows)."""
    wanted = ["asr", "ftr", "cda", "token_accuracy", "perplexity", "answer_words", "repetition"]
    scored = tables.scores(table, wanted, [*SETUP, "defense"])
    return tables.wide(scored, [*SETUP, "seeds", "defense"], "metric", wanted)
