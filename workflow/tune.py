"""Try settings of the defenses against a stand-in trigger of ours, on validation rows.

No defense is tuned on the attack it is measured on: here the suspect is a CBA model with other
trigger words and another target (STAND_IN). Each line of the list is measured and written beside
what was tried, so that a choice can be checked.

python workflow/tune.py params/grids/tune-tiny.csv results/tuning/tiny-gpt2-embedded.csv
"""

import sys
from pathlib import Path

import pandas as pd
import yaml

from lethe_utils import evaluate, params, tables
from lethe_utils.pipeline import contenders
from lethe_utils.stages import read_jsonl, write_text

STAND_IN = {"triggers": ["perhaps", "slowly"], "target_output": "anger"}


def main(candidates: Path, out: Path, model: str = "tiny-gpt2", dataset: str = "embedded") -> None:
    """Measure every candidate.

    Args:
        candidates: CSV with defense (a name in params/defenses) and changes (YAML, may be empty).
        out: the same lines with the validation ASR of the stand-in trigger and CDA.
    """
    tried = pd.read_csv(candidates, keep_default_na=False)
    lines = []
    p = params.load(model, dataset, overrides=STAND_IN)
    for c in contenders.controls(p):
        lines.append({"defense": c.name, "changes": ""} | measured(p, c))
    for defense, changes in tried[["defense", "changes"]].itertuples(index=False):
        overrides = STAND_IN | (yaml.safe_load(changes) or {})
        p = params.load(model, dataset, defense=defense, overrides=overrides)
        for variant in contenders.variants(p):
            line = {"defense": variant[1], "changes": changes}
            lines.append(line | measured(p, contenders.contender(p, *variant)))
            print(lines[-1], flush=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, pd.DataFrame(lines).to_csv(index=False))


def measured(p: params.Params, c: contenders.Contender) -> dict[str, str]:
    """ASR and CDA of one model on validation rows, with their intervals."""
    file = contenders.swept_file(p, c)
    scored = pd.DataFrame(evaluate.rows(p, read_jsonl(file), "validation"))
    cells = dict(zip(scored["metric"], tables.cells(scored), strict=True))
    return {"asr": cells["asr"], "cda": cells["cda"]}


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
