"""Tables of what models write and still can: conversations, and utility."""

import pandas as pd

from lethe_utils import tables
from lethe_utils.paper import SETUP

UTILITY_CAPTION = (
    "Accuracy on multiple-choice tasks of lm-evaluation-harness; 95 % Wilson intervals over "
    "questions. No trigger and no task of the run takes part."
)
UTILITY = "utility_"  # how its metrics start
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


def has_utility(table: pd.DataFrame) -> bool:
    """Whether some utility was measured."""
    return bool(table["metric"].str.startswith(UTILITY).any())


def utility_table(table: pd.DataFrame) -> pd.DataFrame:
    """What each model can still do, seeds pooled: model, dataset, attack, seeds, defense, and a
    column per task."""
    wanted = sorted(m for m in table["metric"].unique() if m.startswith(UTILITY))
    scored = tables.scores(table, wanted, [*SETUP, "defense"])
    scored["metric"] = scored["metric"].str.removeprefix(UTILITY)
    tasks = [m.removeprefix(UTILITY) for m in wanted]
    return tables.wide(scored, [*SETUP, "seeds", "defense"], "metric", tasks)
