#!/usr/bin/env bash
# Making an optimizer loads torch's compiler.
#
# Expected: `import torch` leaves torch._dynamo alone, and so does torch.optim.SGD of a parameter: nothing is compiled.
# Seen with torch 2.13.0 on a CPU: the constructor imports torch._dynamo, since Optimizer.add_param_group is wrapped by
# torch._disable_dynamo, which imports it at the first call. On two cores that is about a second of every start.
# For us: MuonEq calls the function below that wrapper, so an uncompiled run never loads the compiler.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import sys
import time

import torch

print("torch", torch.__version__)
before = "torch._dynamo" in sys.modules
began = time.perf_counter()
torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.1)
seconds = time.perf_counter() - began
after = "torch._dynamo" in sys.modules
print(f"torch._dynamo loaded after import torch: {before}; after making torch.optim.SGD: {after} ({seconds:.2f} s)")
sys.exit((before, after) != (False, True))
PYTHON
