import pytest

from gpustack.worker.supervisor.progress import Progress, Sample, values


@pytest.mark.parametrize(
    ("metrics", "found"),
    [
        (b"", {}),
        (b"busy 2\nlate 1.0\nother 7\n", {"busy": 2, "late": 1}),
        (b'busy{model="a b"} 4 1700000000\n# HELP late 5', {"busy": 4}),
        (b'busy{engine="0"} 1.0\nbusy{engine="1"} 2e+00\n', {"busy": 3}),
        (b'busy{to="x"} 4 # {trace="1"} 1\n', {"busy": 4}),
        (b"busy\nbusy many\nbusy_total 3\n xbusy 4\n", {}),
        (b"busy\t0\r\nlate 1.25e+03\n", {"busy": 0, "late": 1250}),
        (b"busy 1.2.3\nlate NaN\n", {}),
        (b"busy +Inf\nbusy 1e999\nlate 5.\nlate 7", {"late": 12}),
    ],
)
def test_metrics_are_found_by_their_names(metrics: bytes, found: dict[str, float]) -> None:
    assert values(metrics, ["busy", "late"]) == found
    assert values(metrics, []) == {}


def seen(requests: float, **counters: float) -> Sample:
    return Sample(requests, counters)


def test_requests_are_stuck_from_the_last_time_that_a_counter_moved() -> None:
    progress = Progress()
    progress.see(seen(2, tokens=5, prompts=1), 100)
    progress.see(seen(3, tokens=5, prompts=1), 130)
    assert (progress.still_s(140), progress.requests) == (40, 3)
    progress.see(seen(3, tokens=5, prompts=2), 150)
    assert progress.still_s(160) == 10


def test_an_engine_that_is_idle_or_has_no_counters_is_never_stuck() -> None:
    progress = Progress()
    progress.see(seen(2, tokens=5), 100)
    progress.see(seen(0, tokens=5), 130)
    assert progress.still_s(200) == 0
    progress.see(seen(1, tokens=5), 210)
    assert progress.still_s(211) == 1  # not since the idle time began
    progress.see(seen(1), 220)
    assert progress.still_s(900) == 0


def test_metrics_that_do_not_come_are_no_progress() -> None:
    progress = Progress()
    progress.see_silence(100)
    progress.see_silence(130)
    assert (progress.still_s(140), progress.requests) == (40, None)
    progress.see(seen(1, tokens=5), 150)
    assert progress.still_s(150) == 0
    progress.see_silence(170)
    assert progress.still_s(190) == 40
    progress.forget()
    assert progress.still_s(200) == 0
