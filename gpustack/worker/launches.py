"""From an assigned instance to the process that runs it on this worker."""

import os
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from gpustack.backends import backend_for
from gpustack.backends.base import Backend, Slot
from gpustack.config.options import Settings, options
from gpustack.errors import Unavailable
from gpustack.lib import platform
from gpustack.lib.secrets import Secret, new_secret
from gpustack.schemas.instances import AssignedInstance
from gpustack.schemas.models import VersionSpec
from gpustack.worker.model_files import ModelFiles
from gpustack.worker.ports import PortLeases
from gpustack.worker.reconcile import Failure, Trouble
from gpustack.worker.supervisor.engine import Plan
from gpustack.worker.supervisor.engine_log import log_path
from gpustack.worker.supervisor.records import Record, Records


class Launches:
    """Makes plans for engines of this worker."""

    def __init__(
        self,
        settings: Settings,
        *,
        records: Records,
        files: ModelFiles,
        leases: PortLeases,
        worker_name: str,
    ) -> None:
        self._settings = settings
        self._records = records
        self._files = files
        self._leases = leases
        self._worker_name = worker_name

    async def plan(
        self, instance: AssignedInstance, restart_count: int, progress: Callable[[float], None]
    ) -> Plan | Failure:
        """All that it takes to spawn the instance's engine; the port in it is leased."""
        backend = backend_for(instance.spec)
        if backend is None:
            wanted = instance.spec.backend or f"for {instance.spec.location}"
            return Failure(Trouble.BACKEND, f"this version has no backend {wanted}")
        if (problem := backend.problem(instance.spec)) is not None:
            return Failure(Trouble.BACKEND, problem)
        programs = self._programs(backend, instance.spec)
        if isinstance(programs, Failure):
            return programs
        path = await self._files.path(instance.spec, progress)
        if isinstance(path, Failure):
            return path
        try:
            port = self._leases.lease()
        except Unavailable as error:
            return Failure(Trouble.NO_PORT, str(error))
        return self._plan(instance, restart_count, backend, programs, path, port)

    def _programs(self, backend: Backend, spec: VersionSpec) -> dict[str, str] | Failure:
        """Program name -> path of what is installed here, of the version that is asked for."""
        search = os.pathsep.join([str(self._settings.bin_dir), os.environ.get("PATH", "")])
        found = {}
        for name in backend.programs:
            file = f"{name}_{spec.backend_version}" if spec.backend_version else name
            if (path := shutil.which(file, path=search)) is not None:
                found[name] = path
        if spec.backend_version and not found:
            wanted = f"{backend.programs[0]}_{spec.backend_version}"
            return Failure(
                Trouble.BACKEND,
                f"{backend.name} {spec.backend_version} is not installed on worker "
                f"{self._worker_name}: put it as {wanted} into {self._settings.bin_dir}",
            )
        return found

    def _plan(
        self,
        instance: AssignedInstance,
        restart_count: int,
        backend: Backend,
        programs: Mapping[str, str],
        path: Path,
        port: int,
    ) -> Plan:
        uid = new_secret()
        secret_file = str(self._records.secret_path(uid))
        launch = backend.launch(
            instance.spec,
            Slot(
                model_path=str(path),
                served_name=instance.model_name,
                port=port,
                secret_file=secret_file,
                devices=tuple(sorted(instance.claim.vram_bytes)) if instance.claim else (),
                executables=programs,
                python=sys.executable,
            ),
        )
        record = Record(
            uid=uid,
            instance_id=instance.id,
            instance_name=instance.name,
            generation=instance.generation,
            port=port,
            secret_file=secret_file,
            log_file=str(log_path(self._settings.log_dir, instance.id)),
            argv=list(launch.argv),
            health_path=launch.health_path,
            busy_gauges=list(launch.busy_gauges),
            progress_counters=list(launch.progress_counters),
            probe=launch.probe,
            limits=launch.limits,
            restart_count=restart_count,
            boot_id=platform.boot_id(),
        )
        # An engine without a secret would answer anyone on this machine.
        secret = Secret(instance.secret or new_secret())
        variables = environment_for_engines(os.environ)
        if Path(launch.argv[0]).parent == self._settings.bin_dir:
            variables |= own_libraries(Path(launch.argv[0]), variables)
        return Plan(record, {**variables, **launch.env}, secret)


def environment_for_engines(ours: Mapping[str, str]) -> dict[str, str]:
    """Our environment without what is ours alone: settings, and every secret among them."""
    secrets = {name for option in options() if option.secret for name in option.env}
    return {
        name: value
        for name, value in ours.items()
        if not name.startswith("GPUSTACK_") and name not in secrets
    }


def own_libraries(program: Path, variables: Mapping[str, str]) -> dict[str, str]:
    """How a program that is a link into a folder of its own finds the libraries there.

    `gpustack download-tools` installs dynamically linked builds so.
    """
    home = program.resolve().parent
    if home == program.parent or sys.platform != "linux":
        return {}
    path = variables.get("LD_LIBRARY_PATH")
    return {"LD_LIBRARY_PATH": f"{home}{os.pathsep}{path}" if path else str(home)}
