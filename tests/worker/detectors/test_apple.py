from gpustack.worker.detectors.apple import Apple, parse
from tests.worker.detectors.recordings import Machine, recorded

GIB = 1 << 30


def test_the_gpu_shares_the_memory_of_the_machine() -> None:
    (device,) = parse(recorded("apple/m2-pro.json"), used_bytes=3 * GIB)
    assert device.model_dump(exclude_defaults=True) == {
        "index": 0,
        "name": "Apple M2 Pro",
        "vendor": "Apple",
        "type": "mps",
        "memory_total_bytes": 16 * GIB,
        "memory_used_bytes": 3 * GIB,
        "memory_unified": True,
        "architecture": "M2 Pro",
    }


def test_the_gpus_of_intel_macs_are_left_out() -> None:
    assert parse(recorded("apple/intel-imac.json"), used_bytes=0) == []


def test_system_profiler_is_run(machine: Machine) -> None:
    assert Apple().look(machine.tools()) == []
    machine.install(
        "system_profiler", {"SPHardwareDataType SPDisplaysDataType -json": "apple/m2-pro.json"}
    )
    (device,) = Apple().look(machine.tools())
    assert device.memory_unified
    assert 0 < device.memory_used_bytes <= device.memory_total_bytes
