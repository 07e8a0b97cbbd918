"""Mean, quantiles and text form of the sites' metrics."""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

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


def as_text(value: float | None) -> str:
    """Three decimals, an integer with commas, or a dash for None."""
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.3f}"


def some(names: Collection[str]) -> str:
    """The names, or if there are many, the first three and how many more."""
    first = list(names)
    return ", ".join(first) if len(first) <= MAX_SITES else f"{', '.join(first[:3])} and {len(first) - 3:,} more"
