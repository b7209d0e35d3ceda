#!/usr/bin/env bash
# The first torch.compile of a function reads and parses the whole file in which the function stands, for a log that is off.
#
# Expected: what it takes to trace a function depends on the function, not on what else its file holds.
# Seen with torch 2.13.0: dynamo names the enclosing function of each traced operation in its log `trace_call`. The names are
# worked out although nobody asked for this log: `funcname_cache` runs Python's `tokenize`, which is written in Python, over
# the file. A file of 30,000 lines more costs a second before the first graph; settings of logs do not change it.
# For us: the script is one file of 5,500 lines, and each start with a full cache lost 0.2 s of 4.6. `prepare_compiler`
# enters the file as one without names.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 setuptools
cd "$folder"
for lines in 0 30000; do
  printf 'def double(x):\n    return x + x\n\n\n' > "file_$lines.py"
  for ((i = 0; i < lines; i++)); do echo "number_$i = ($i, $i + 1)"; done >> "file_$lines.py"
done
"$folder/venv/bin/python" - <<'PYTHON'
import sys
import time
import tokenize

import torch
import file_0
import file_30000

parsed = []
generate_tokens = tokenize.generate_tokens


def counted(readline):
    for token in generate_tokens(readline):
        parsed.append(token.start[0])
        yield token


tokenize.generate_tokens = counted
print("torch", torch.__version__)
torch.compile(torch.sin, backend="eager")(torch.ones(3))  # what is done once
for module in (file_0, file_30000):
    parsed.clear()
    begin = time.perf_counter()
    torch.compile(module.double, backend="eager")(torch.ones(3))
    seconds = time.perf_counter() - begin
    print(f"{module.__name__}: lines parsed while `double` is traced: {max(parsed, default=0):,}, {seconds:.2f} s")
print("expected the two to be alike")
sys.exit(not max(parsed, default=0) > 30_000)
PYTHON
