#!/usr/bin/env bash
# The step of muon-optimizer changes the gradients.
#
# Expected: step() reads p.grad and leaves it as it is, as all optimizers of torch do; it may be logged or clipped again.
# Seen with muon-optimizer 0.1.0 and torch 2.13.0: afterwards p.grad is the Nesterov blend of gradient and momentum, at
# the first step 0.0975 of the gradient. A norm that is logged after the step is ten times too small.
# For us: who compares gradient norms of runs with MuonEq and with muon-optimizer logs them before the step.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 muon-optimizer==0.1.0
"$folder/venv/bin/python" - <<'PYTHON'
import importlib.metadata
import sys

import muon
import torch

print("torch", torch.__version__, "muon-optimizer", importlib.metadata.version("muon-optimizer"))
ratios = {}
for make in (muon.SingleDeviceMuon, torch.optim.Muon):
    p = torch.nn.Parameter(torch.randn(4, 6))
    p.grad = torch.randn(4, 6)
    before = p.grad.norm()
    make([p], lr=0.02).step()
    ratios[make.__module__] = (p.grad.norm() / before).item()
    print(f"{make.__module__}.{make.__name__}: norm of p.grad after the step over before: {ratios[make.__module__]:.4f}"
          ", expected 1")
ours, torchs = ratios.values()
sys.exit(not (abs(ours - 0.0975) < 1e-4 and torchs == 1.0))
PYTHON
