"""The symptom table of the docs against the alarms of a run."""

import re

from distill.compose import RECIPES
from distill.pipeline.evaluation import health
from distill.pipeline.evaluation.validation import WORSE


def test_the_symptoms_of_the_docs_are_named_as_the_alarms_name_them():
    page = (RECIPES.parent / "docs" / "troubleshooting.md").read_text()
    rows = page.partition("## Symptoms of a bad student")[2].partition("\n## ")[0].splitlines()
    cells = [row.split("|")[2] for row in rows if row.startswith("| ")][1:]
    stated = [name for cell in cells for name in re.findall("`([^`]+)`", cell)]
    assert len(stated) > 5
    assert set(stated) <= {*health.WORDS.values(), "reward NAME is hacked", WORSE}
