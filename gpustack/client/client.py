"""The API as typed methods: what the command line and users' programs call."""

import ssl

from gpustack.client import resources
from gpustack.client.caller import Caller
from gpustack.schemas.apply import Applied, Apply
from gpustack.schemas.credentials import ClusterToken


class Client(Caller):
    """One server and one credential; each resource is an attribute.

    >>> async with Client("http://server", "gpustack_…") as client:
    ...     running = await client.instances.list(state="running")
    """

    def __init__(
        self,
        base_url: str,
        token: str | None = None,
        *,
        timeout_s: float = 15.0,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        super().__init__(base_url, token, timeout_s=timeout_s, tls=tls)
        self.models = resources.Models(self)
        self.instances = resources.Instances(self)
        self.workers = resources.Workers(self)
        self.gpu_devices = resources.GPUDevices(self)
        self.model_files = resources.ModelFiles(self)
        self.users = resources.Users(self)
        self.groups = resources.Groups(self)
        self.api_keys = resources.ApiKeys(self)
        self.join_tokens = resources.JoinTokens(self)
        self.usage = resources.Usage(self)
        self.dashboard = resources.Dashboards(self)
        self.events = resources.Events(self)
        self.audit = resources.AuditLog(self)
        self.settings = resources.Settings(self)

    async def apply(self, wanted: Apply) -> Applied:
        """Bring the cluster to what `wanted` says, all of it or nothing."""
        return await self.one("POST", "/v2/apply", Applied, wanted)

    async def rotate_cluster_token(self) -> ClusterToken:
        """Replace the token with which workers register; those that have go on."""
        return await self.one("POST", "/v2/cluster-token/rotate", ClusterToken)
