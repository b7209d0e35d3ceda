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

# check REQUIREMENTS PACKAGE...: whether $python is new enough and has the packages, in one start of Python
check() {
  local status=0 packages
  "$python" -c 'import sys
if sys.version_info < (3, 11): sys.exit(3)
import importlib.util
sys.exit(0 if all(map(importlib.util.find_spec, sys.argv[1:])) else 4)' "${@:2}" || status=$?
  packages=$(printf ' and %s' "${@:2}")
  case $status in
    0) ;;
    3) die "$python is older than Python 3.11; set PYTHON to a newer one" ;;
    4) die "$python has no${packages# and}: pip install -r $1" ;;
    *) die "$python cannot be run" ;;
  esac
}

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
    if [ ! -x .venv/bin/python ]; then check "$requirements"; fi
    echo "run.sh: installing $requirements into .venv, a minute or two"
    # pip is silent for long: every five seconds something is said, as long as this script lives
    (seconds=0; while sleep 5 >/dev/null 2>&1 && kill -0 $$; do seconds=$((seconds + 5)); echo "run.sh: installing, $seconds s"; done) &
    saying=$!
    trap 'kill $saying' EXIT
    if [ ! -x .venv/bin/python ]; then
      "$python" -m venv .venv || die "cannot create .venv (on Debian and Ubuntu: apt install python3-venv)"
    fi
    .venv/bin/python -m pip install --quiet -r "$requirements" || die "pip could not install $requirements (see above)"
    kill $saying
    trap - EXIT
    # written last: an interrupted installation is repeated, a complete one is not
    echo "$wanted" > ".venv/$requirements.installed"
  fi
  python=.venv/bin/python
fi

if [ "$job" = test ]; then
  check requirements-dev.txt pytest hypothesis
  OMP_NUM_THREADS=1 exec "$python" -m pytest "$@"
fi

check requirements.txt torch numpy
for word in "$@"; do
  if [ "$word" = --help ] || [ "$word" = -h ]; then exec "$python" train_gpt.py --help; fi
done
exec "$python" tools/launch.py --track "$track" "$@"
