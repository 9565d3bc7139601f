"""What agents say. Apart from the rest, so that no agent loads what only users need."""

from gpustack.client.caller import Caller, parsed
from gpustack.schemas.instances import InstanceStatus
from gpustack.schemas.model_files import ModelFile, ModelFileReport, ModelFileStatus
from gpustack.schemas.workers import Heard, Heartbeat, Registered, Registration, WorkerStatus


class AgentClient(Caller):
    """The calls of a worker's agent."""

    async def register(self, registration: Registration) -> Registered:
        """Join the cluster. The client's token is the cluster's join token."""
        return await self.one("POST", "/v2/workers/register", Registered, registration)

    async def announce(self, worker_id: int, registration: Registration) -> Registered:
        """Say again who this worker is. The client's token is the worker's credential."""
        path = f"/v2/workers/{worker_id}/registration"
        return await self.one("PUT", path, Registered, registration)

    async def heartbeat(self, worker_id: int, beat: Heartbeat) -> Heard:
        raw = await self.call("PUT", f"/v2/workers/{worker_id}/heartbeat", beat)
        return parsed(Heard, raw) if raw else Heard()  # an older server has nothing to say

    async def report_worker(self, worker_id: int, status: WorkerStatus) -> None:
        await self.call("PUT", f"/v2/workers/{worker_id}/status", status)

    async def report_instance(self, instance_id: int, status: InstanceStatus) -> None:
        await self.call("PUT", f"/v2/model-instances/{instance_id}/status", status)

    async def report_new_model_file(self, worker_id: int, report: ModelFileReport) -> ModelFile:
        return await self.one("POST", f"/v2/workers/{worker_id}/model-files", ModelFile, report)

    async def report_model_file(self, file_id: int, status: ModelFileStatus) -> None:
        await self.call("PUT", f"/v2/model-files/{file_id}/status", status)
