"""Mean, quantiles and text form of the sites' metrics."""

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from federation.protocol import METRIC

MAX_SITES = 8  # with more sites, a page and a plot have quantiles over the sites instead of each site
MAX_WORST = 10
QUANTILES = {"min": 0.0, "10 %": 0.1, "median": 0.5, "90 %": 0.9, "max": 1.0}


def weighted_mean(values: Mapping[str, float | None], weights: Mapping[str, int]) -> float | None:
    """Mean over the sites that have a value; None if no site has one, as for a metric that the model does not log.

    Args:
        values: site -> metric.
        weights: site -> number of images behind the metric.
    """
    known = {site: value for site, value in values.items() if value is not None}
    total = sum(weights[site] for site in known)
    return sum(value * weights[site] for site, value in known.items()) / total if total else None


def validation(
    number: int, reports: dict[str, tuple[dict[str, Any], int]], asked: list[str], lost: list[str]
) -> dict[str, Any]:
    """Validation metrics after round `number`, weighted by images per site.

    Args:
        number: of the round.
        reports: site -> its metrics, its number of validation images.
        asked: the sites that were to validate this model.
        lost: sites that were lost later; the means of all rounds exclude them.
    """
    names = (METRIC, "val_loss")
    accuracies, losses = ({site: reports.get(site, ({}, 0))[0].get(name) for site in asked} for name in names)
    images = {site: 0 if site in lost else reports.get(site, ({}, 0))[1] for site in asked}
    mean = weighted_mean(accuracies, images)
    return {
        "round": number,
        "accuracy": mean,
        "sites": _rounded(accuracies),
        "loss": weighted_mean(losses, images),
        "losses": _rounded(losses),
        "missing": [] if mean is None else [site for site in asked if accuracies[site] is None or not images[site]],
    }


def _rounded(values: dict[str, float | None]) -> dict[str, float | None]:
    """The precision of float32, which is what models log: rounds x sites of them are most of results.json."""
    return {site: value if value is None else round(value, 7) for site, value in values.items()}


def quantiles(values: Iterable[float | None]) -> list[Any]:
    """`QUANTILES` of the values that are not None, each of them one of the values; all None if there are none."""
    import numpy as np  # not above: `results.py --help` need not wait for it

    known = [value for value in values if value is not None]
    shares = [*QUANTILES.values()]
    return np.quantile(known, shares, method="inverted_cdf").tolist() if known else [None] * len(shares)


def worst_sites(test: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The sites of a `test` in results.json with the lowest accuracies, ascending; unknown ones last."""
    order = sorted(test["sites"].items(), key=lambda item: (item[1]["accuracy"] is None, item[1]["accuracy"] or 0))
    return dict(order[:MAX_WORST])


def by_number(site: str) -> tuple[int, str]:
    """site-2 before site-10."""
    digits = re.search(r"\d+$", site)
    return (int(digits[0]) if digits else 0, site)


def as_text(value: float | None) -> str:
    """Three decimals, an integer with commas, or a dash for None."""
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.3f}"


def some(names: Collection[str]) -> str:
    """The names, or if there are many, the first three and how many more."""
    first = list(names)
    return ", ".join(first) if len(first) <= MAX_SITES else f"{', '.join(first[:3])} and {len(first) - 3:,} more"
