"""Names of headers and kinds that two halves of the product must spell alike.

Imports nothing, so that the gateway can read it without pydantic.
"""

# Gateway to server, on requests it passes on; believed only with a gateway's credential.
GATEWAY_HEADER = "x-gpustack-gateway"  # the credential
PEER_HEADER = "x-gpustack-peer"  # address of the client
SCHEME_HEADER = "x-gpustack-scheme"  # http or https
LOCAL_HEADER = "x-gpustack-local"  # "1": the loopback rule holds, no login is needed
VOUCHED_HEADER = "x-gpustack-vouched"  # "1": this origin's pages may use their user's session

# Gateway to relay: which instance. The secret travels as `Authorization: Bearer`.
INSTANCE_HEADER = "x-gpustack-instance"

# Relay to gateway: it was the relay that refused, not the engine; another instance may be tried.
RELAY_REFUSED_HEADER = "x-gpustack-relay-refused"

# Relay to gateway, to have requests sent back over one connection; see gateway/tunnels.py.
TUNNEL_PATH = "/v2/tunnel"
HAS_HEADER = "x-gpustack-has"  # lives of the gateway processes to which it has a tunnel
RELAY_HEADER = "x-gpustack-relay"  # its own life
PROCESS_HEADER = "x-gpustack-process"  # the answer: node, life, index and count of processes

# Server to its node's gateway, below TUNNEL_PATH: the secret that a worker's agent asks for.
AGENT_HEADER = "x-gpustack-agent"

# Every header that a client must not be able to set: the gateway removes them.
PRIVATE_PREFIX = "x-gpustack-"

# Kinds of watched objects: the words in `?kinds=`, in events and in paths.
MODELS = "models"
INSTANCES = "model-instances"
WORKERS = "workers"
MODEL_FILES = "model-files"
CREDENTIALS = "credentials"
API_KEYS = "api-keys"  # each user's own, without what is secret of them
KINDS = frozenset({MODELS, INSTANCES, WORKERS, MODEL_FILES, CREDENTIALS, API_KEYS})

#: In a worker's data directory: its key and certificate, as PEM. Written by the agent alone.
WORKER_CERTIFICATE_FILE = "worker_certificate.pem"

SESSION_COOKIE = "gpustack_session"
