"""How long to wait before trying again."""


def delay_s(failures: int, *, first_s: float, limit_s: float) -> float:
    """Seconds to wait after `failures` failures in a row: first_s, doubling, at most limit_s.

    No failure, no wait.
    """
    if failures <= 0:
        return 0.0
    return float(min(first_s * 2.0 ** min(failures - 1, 60), limit_s))
