"""Reject invalid answers, all of them at once, before any file of the project is written.

Cookiecutter renders this file with the answers, runs it in the new folder, and removes that folder if it fails.
Standard library only: the Python that runs cookiecutter may have none of the project's packages.
"""

import json
import re
import sys
import unicodedata
from typing import Any

SLUG = r"[a-z]([a-z0-9_-]{0,62}[a-z0-9])?"
WHOLE_NUMBERS = {"num_clients": 1000, "rounds": 10000}  # maximum; the minimum is 1


def faults(answers: dict[str, Any]) -> list[str]:
    """Return what is wrong with the answers, one line per fault: the answer and what is allowed instead."""
    found = []

    name = answers["project_name"]
    # Control characters, line and paragraph separators, and surrogates, which cannot be encoded.
    unusable = {"Cc", "Cs", "Zl", "Zp"} & {unicodedata.category(character) for character in name}
    if unusable or not name.strip():
        found.append(f"project_name is {name!r}: must be non-empty text without control characters")

    slug = answers["project_slug"]
    if not re.fullmatch(SLUG, slug):
        found.append(f"project_slug is {slug!r}: 1-64 of a-z, 0-9, -, _; first a letter, last not - or _")

    for question, highest in WHOLE_NUMBERS.items():
        answer = str(answers[question])
        if not re.fullmatch("[0-9]{1,9}", answer) or not 1 <= int(answer) <= highest:
            found.append(f"{question} is {answer!r}: must be a whole number from 1 to {highest}")

    return found


if __name__ == "__main__":
    # The answers as JSON in a Python literal, safe for any characters. This is the only template code here.
    answers = json.loads({{cookiecutter | tojson | tojson}})  # type: ignore[arg-type, name-defined]  # noqa: F821
    sys.exit("\n".join(faults(answers)) or 0)
