"""Mean and text form of the sites' metrics."""


def weighted_mean(values: dict[str, float | None], weights: dict[str, int]) -> float | None:
    """Mean over the sites that have a value; None if no site has one, as for a metric that the model does not log.

    Args:
        values: site -> metric.
        weights: site -> number of images behind the metric.
    """
    known = {site: value for site, value in values.items() if value is not None}
    total = sum(weights[site] for site in known)
    return sum(value * weights[site] for site, value in known.items()) / total if total else None


def as_text(value: float | None) -> str:
    """Three decimals, or a dash for None."""
    return "-" if value is None else f"{value:.3f}"
