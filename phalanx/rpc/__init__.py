"""How Phalanx speaks gRPC: channels, servers, deadlines, retries, errors; no decisions."""

import os

# gRPC's C core writes its own unstructured lines to standard error; what matters in them is also in
# the errors that calls raise. It reads the variable once, when gRPC is first imported.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
