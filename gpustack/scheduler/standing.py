"""How well an instance is placed. Pure."""

from dataclasses import replace

from gpustack.scheduler.plan import score
from gpustack.scheduler.snapshot import Node
from gpustack.schemas.models import ModelSpec
from gpustack.schemas.placements import Claim


def standing(spec: ModelSpec, node: Node, claim: Claim) -> tuple[float, ...]:
    """How well an instance stands on the worker that it is on; larger is better.

    First whether the devices that it is on are well, then the share of its memory that is on
    devices: what runs partly on the host is slower. Then what the scheduler would say of that
    worker if the instance were to be placed now: so the worst is the one that it would place last,
    by the model's own strategy.

    Args:
        node: with this instance and its claim on it.
    """
    vram = sum(claim.vram_bytes.values())
    share = vram / (vram + claim.ram_bytes) if vram else 0.0
    without = replace(node.plus(claim), instances=max(node.instances - 1, 0))
    broken = node.unhealthy
    is_well = all(claim.of_device(one.type, one.index) is None for one in broken)
    return (is_well, share, *score(spec, without, claim))
