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

# installed FILE TEXT: whether .venv was installed from FILE when it asked for the packages in TEXT
installed() { [ "$(cat ".venv/$1.installed" 2>/dev/null)" = "$2" ]; }

if [ "$system" = 0 ]; then
  for_training=$(cat requirements.txt)
  for_tests=$(cat requirements.txt requirements-dev.txt)
  requirements=requirements.txt
  wanted=$for_training
  if [ "$job" = test ]; then
    requirements=requirements-dev.txt
    wanted=$for_tests
  fi
  # where the packages of the tests are installed, those of training are too
  if ! installed "$requirements" "$wanted" && ! installed requirements-dev.txt "$for_tests"; then
    echo "run.sh: installing $requirements into .venv"
    if [ ! -x .venv/bin/python ]; then
      "$python" -m venv .venv || die "cannot create .venv (on Debian and Ubuntu: apt install python3-venv)"
    fi
    .venv/bin/python -m pip install --quiet -r "$requirements" || die "pip could not install $requirements (see above)"
    # written last: an interrupted installation is repeated, a complete one is not
    echo "$wanted" > ".venv/$requirements.installed"
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
exec "$python" tools/launch.py --track "$track" "$@"
