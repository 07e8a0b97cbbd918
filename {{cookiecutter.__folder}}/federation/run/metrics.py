"""The mean of the sites' metrics, and how a metric is written."""


def weighted_mean(values: dict[str, float | None], weights: dict[str, int]) -> float | None:
    """The mean over the sites that have a value; None if none has, as for a metric that the model does not log.

    Args:
        values: site -> metric.
        weights: site -> number of images that it was measured on.
    """
    known = {site: value for site, value in values.items() if value is not None}
    total = sum(weights[site] for site in known)
    return sum(value * weights[site] for site, value in known.items()) / total if total else None


def as_text(value: float | None) -> str:
    """Three decimals; a dash where there is none."""
    return "-" if value is None else f"{value:.3f}"
