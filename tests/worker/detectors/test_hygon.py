from gpustack.worker.detectors.hygon import Hygon, parse
from tests.worker.detectors.recordings import Machine, recorded

MIB = 1 << 20


def test_hy_smi_is_read() -> None:
    first, second = parse(recorded("hygon/k100-ai.json"))
    assert first.model_dump(exclude_defaults=True) == {
        "index": 0,
        "name": "K100_AI",
        "vendor": "Hygon",
        "type": "dcu",
        "uuid": "7137d9b2a08a4841",
        "memory_total_bytes": 65520 * MIB,
        "memory_used_bytes": 2 * MIB,
        "utilization_percent": 0.0,
        "temperature_celsius": 35.0,
        "power_watts": 77.0,
    }
    assert (second.index, second.uuid) == (1, "7137d9debec858c1")


def test_the_words_of_older_versions_are_read() -> None:
    (device,) = parse(recorded("hygon/dcu-24.04.3.json"))
    assert (device.utilization_percent, device.power_watts) == (0.0, 80.0)
    bytes_of_old = '{"card0": {"vram Total Memory (B)": "34342961152"}}'
    assert parse(bytes_of_old)[0].memory_total_bytes == 34342961152


def test_hy_smi_is_run(machine: Machine) -> None:
    assert Hygon().look(machine.tools()) == []
    machine.install("hy-smi", {"--showid --showmeminfo vram * --json": "hygon/k100-ai.json"})
    assert Hygon().look(machine.tools()) == parse(recorded("hygon/k100-ai.json"))
