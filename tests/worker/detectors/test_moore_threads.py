from gpustack.worker.detectors.moore_threads import MooreThreads, parse, parse_table
from tests.worker.detectors.recordings import Machine, recorded

MIB = 1 << 20


def test_the_json_of_mthreads_gmi_is_read() -> None:
    first, second = parse(recorded("moore_threads/s5000.json"))
    assert first.model_dump(exclude_defaults=True) == {
        "index": 0,
        "name": "MTT S5000",
        "vendor": "Moore Threads",
        "type": "musa",
        "uuid": "399282a8-ba01-1475-893c-2eeca9e302f5",
        "memory_total_bytes": 81920 * MIB,
        "driver_version": "3.3.5-server",
        "utilization_percent": 0.0,
        "temperature_celsius": 27.0,
        "power_watts": 96.66,
    }
    assert (second.index, second.power_watts) == (1, 97.09)


def test_the_table_of_mthreads_gmi_is_read() -> None:
    first, second = parse_table(recorded("moore_threads/s5000-2.3.2.txt"))
    assert (first.name, first.memory_used_bytes) == ("MTT S5000", 66641 * MIB)
    assert (second.index, second.temperature_celsius) == (1, 51.0)
    (old,) = parse_table(recorded("moore_threads/s80-1.14.0.txt"))
    assert old.model_dump(exclude_defaults=True) == {
        "index": 0,
        "name": "MTT S80",
        "vendor": "Moore Threads",
        "type": "musa",
        "memory_total_bytes": 16384 * MIB,
        "memory_used_bytes": 2 * MIB,
        "driver_version": "2.7.0",
        "utilization_percent": 0.0,
        "temperature_celsius": 49.0,
    }


def test_mthreads_gmi_is_run_and_its_table_where_it_has_no_json(machine: Machine) -> None:
    assert MooreThreads().look(machine.tools()) == []
    answers = {"": "moore_threads/s80-1.14.0.txt"}
    machine.install("mthreads-gmi", answers)
    assert MooreThreads().look(machine.tools())[0].name == "MTT S80"
    machine.install("mthreads-gmi", {**answers, "-q --json": "moore_threads/s5000.json"})
    assert len(MooreThreads().look(machine.tools())) == 2
