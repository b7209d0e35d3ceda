#!/usr/bin/env bash
# ./run.sh [--system] [TRACK] [--section.field value ...]   train: sets up Python and data, then runs train_gpt.py
# ./run.sh [--system] test [pytest arguments]               run the whole test suite
# --system uses the Python at hand as it is instead of a .venv with the pinned requirements.
set -euo pipefail
for name in DATA_DIR CACHE_DIR; do  # relative to where the command was typed
  value=${!name:-}
  if [ -n "$value" ] && [ "${value#/}" = "$value" ]; then export "$name=$PWD/$value"; fi
done
cd "$(dirname "${BASH_SOURCE[0]}")"

die() { echo "run.sh: $1" >&2; exit 1; }

system=0
if [ "${1:-}" = --system ]; then system=1; shift; fi
case "${1:-}" in
  -h|--help) sed -n '2,4s/^# //p' run.sh; echo "./run.sh train --help lists all tracks and fields of the trainer"; exit ;;
  test) job=test; shift ;;
  ""|--*) job=train; track=auto ;;
  train) job=train; track=auto; shift ;;
  *) job=train; track=$1; shift ;;
esac

python=$(command -v "${PYTHON:-python3}") || die "no ${PYTHON:-python3} found; install Python 3.11 or newer, or set PYTHON"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || die "$python is older than Python 3.11; set PYTHON to a newer one"

if [ "$system" = 0 ]; then
  requirements=requirements.txt
  if [ "$job" = test ]; then requirements=requirements-dev.txt; fi
  wanted=$(cat requirements.txt $([ "$job" = test ] && echo requirements-dev.txt))
  stamp=.venv/$requirements.installed
  # the stamp is written last: an interrupted installation is repeated, a complete one is not
  if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ] && [ "$(cat .venv/requirements-dev.txt.installed 2>/dev/null)" != "$(cat requirements.txt requirements-dev.txt)" ]; then
    echo "run.sh: installing $requirements into .venv"
    [ -x .venv/bin/python ] || "$python" -m venv .venv || die "cannot create .venv (on Debian and Ubuntu: apt install python3-venv)"
    .venv/bin/python -m pip install --quiet -r "$requirements" || die "pip could not install $requirements (see above)"
    echo "$wanted" > "$stamp"
  fi
  python=.venv/bin/python
fi

if [ "$job" = test ]; then
  "$python" -c 'import pytest, hypothesis' 2>/dev/null || die "$python has no pytest and hypothesis: pip install -r requirements-dev.txt"
  OMP_NUM_THREADS=1 exec "$python" -m pytest "$@"
fi

"$python" -c 'import sys, importlib.util as u; sys.exit(not all(map(u.find_spec, ["torch", "numpy"])))' || die "$python has no torch and numpy: pip install -r requirements.txt"
for word in "$@"; do
  if [ "$word" = --help ] || [ "$word" = -h ]; then exec "$python" train_gpt.py --help; fi
done

# track, corpus and number of processes: the largest that divides the rows of a step
plan=$("$python" - --track "$track" "$@" <<'PYTHON'
import sys
try:
    import torch
    import train_gpt
except (ImportError, OSError) as error:  # there, but broken
    sys.exit(f"run.sh: {sys.executable} cannot import torch and numpy ({error}): pip install -r requirements.txt")
try:
    track, run = train_gpt.parse_command_line(sys.argv[1:])
    on_cpu = train_gpt.device_of(run, 0).type == "cpu"
    train_gpt.check_settings(track, run)
except ValueError as error:
    sys.exit(f"run.sh: {error}")
most = 1 if on_cpu else torch.accelerator.device_count()
processes = max(n for n in range(1, most + 1) if track.data.rows % n == 0)
if processes < most:
    print(f"run.sh: using {processes} of {most} devices, a step has {track.data.rows} rows", file=sys.stderr)
print(run.track, track.data.corpus, processes)
PYTHON
) || exit 1
read -r track corpus processes <<< "$plan"
if [ ! -f "${DATA_DIR:-data}/$corpus/manifest.json" ]; then
  maker=data/${corpus/fineweb10B/fineweb}.py
  [ -f "$maker" ] || die "there is no data for the corpus $corpus in ${DATA_DIR:-data} and no $maker that makes it"
  "$python" "$maker" || exit 1
fi
exec "$python" - "$processes" train_gpt.py --track "$track" "$@" <<'PYTHON'
import logging, signal, sys
from torch.distributed import run
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.multiprocessing.api import SignalException

logging.disable(logging.CRITICAL)  # the trainer says itself what is wrong, in one sentence
try:
    run.main(["--standalone", f"--nproc_per_node={sys.argv[1]}", *sys.argv[2:]])
except ChildFailedError as error:
    for rank, failure in sorted(error.failures.items()):
        if failure.exitcode < 0:  # what a killed rank cannot say itself
            print(f"run.sh: rank {rank} was ended by {signal.Signals(-failure.exitcode).name}", file=sys.stderr)
    sys.exit(error.get_first_failure()[1].exitcode or 1)
except (KeyboardInterrupt, SignalException):
    sys.exit(130)
PYTHON
