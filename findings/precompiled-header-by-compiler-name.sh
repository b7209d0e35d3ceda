#!/usr/bin/env bash
# torch.compile's precompiled header is of use only if the C++ compiler has "gcc" or "g++" in its name.
#
# Expected: whatever CXX is called, the header that inductor compiles first is the one that g++ reads afterwards.
# Seen with torch 2.13.0: for a wrapper around g++ called `compile-it`, inductor writes the header as NAME.h.pch, which is
# clang's ending. g++ looks for NAME.h.gch and parses all headers again for every kernel, without a word.
# For us: a CXX such as a ccache wrapper of another name makes every graph slower to compile; call it *g++*.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
printf '#!/bin/sh\nexec g++ "$@"\n' > "$folder/compile-it"
cp "$folder/compile-it" "$folder/my-g++"
chmod +x "$folder/compile-it" "$folder/my-g++"
cat > "$folder/run.py" <<'PYTHON'
import torch

print(torch.compile(lambda x: torch.sin(x) * 2)(torch.ones(64)).shape)
PYTHON
for compiler in compile-it my-g++; do
  mkdir "$folder/tmp-$compiler"
  CXX="$folder/$compiler" TMPDIR="$folder/tmp-$compiler" "$folder/venv/bin/python" "$folder/run.py"
  found=$(find "$folder/tmp-$compiler" -name '*.h.?ch' | sed 's/.*\.//' | sort -u | tr '\n' ' ')
  echo "CXX=$compiler: endings of precompiled headers: $found"
  case "$compiler" in
    compile-it) [ "$found" = "pch " ] ;;
    my-g++) [ "$found" = "gch " ] ;;
  esac
done
