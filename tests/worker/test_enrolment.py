"""What this worker keeps of its membership."""

from pathlib import Path

from gpustack.config.load import load
from gpustack.worker.enrolment import (
    Enrolment,
    Membership,
    load_membership,
    registration,
    save_membership,
)


def test_what_cannot_be_kept_now_is_kept_when_the_server_says_it_again(tmp_path: Path) -> None:
    """The relay reads it from the file: what the agent alone knows is of no use."""
    data_dir, away = tmp_path / "data", tmp_path / "away"
    data_dir.mkdir()
    save_membership(
        data_dir, Membership(worker_id=1, credential="c", agent_secret="s", cluster_id="x")
    )
    said = registration(load({"data_dir": str(data_dir)}, {}).settings, "127.0.0.1", "")
    enrolment = Enrolment(data_dir=data_dir, server_url="", join_token="", registration=said)
    data_dir.rename(away)
    data_dir.touch()  # no folder: nothing can be written below it
    enrolment.told_tunnel(tunnel=True)
    data_dir.unlink()
    away.rename(data_dir)
    enrolment.told_tunnel(tunnel=True)
    kept = load_membership(data_dir)
    assert kept is not None
    assert kept.tunnel
