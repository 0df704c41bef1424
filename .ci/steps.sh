# Sourced by the scripts beside it: steps that are timed, counted, and compared with a list at the end.
#
# A script lists its steps in `planned`, runs each with `step NAME COMMAND...`, and calls `finish`. A step that fails
# ends the script; a step that was listed and not run, or run and not listed, fails it in `finish`.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
unset PYTHONPATH  # what is tried is what is installed
work=$(mktemp -d)  # everything that is made here stays outside of the tracked tree
completed=()
durations=()
current=""

leave() {
  local status=$?
  rm -rf "$work"
  if [ "$status" -ne 0 ]; then
    echo "FAILED${current:+ in step '$current'} after ${SECONDS} s"
  fi
}
trap leave EXIT

step() {
  current=$1
  shift
  local begin=$SECONDS
  echo
  echo "== $current"
  "$@"
  completed+=("$current")
  durations+=("$((SECONDS - begin))")
  echo "== $current: ok, $((SECONDS - begin)) s"
  current=""
}

finish() {
  local index
  echo
  for index in "${!completed[@]}"; do
    printf '%5d s  %s\n' "${durations[$index]}" "${completed[$index]}"
  done
  if [ "${planned[*]}" != "${completed[*]}" ]; then
    echo "planned: ${planned[*]}"
    echo "run:     ${completed[*]}"
    echo "A step was left out."
    return 1
  fi
  echo "all ${#planned[@]} steps ran, ${SECONDS} s"
}

# The first interpreter that is new enough.
find_python() {
  local candidate
  for candidate in python3.11 python3 python; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "No Python of version 3.10 or newer was found." >&2
  return 1
}

# Make a virtual environment and make it the one that `python` and every tool come from.
enter_environment() {
  local python
  python=$(find_python)
  "$python" -m venv "$1"
  # shellcheck disable=SC1091
  source "$1/bin/activate"
  python --version
}

# Everything in the report of a test run must have run: some tests passed, and nothing was skipped but for want of a GPU.
check_tests_ran() {
  local skipped
  if ! grep -Eq '^=+ .*[1-9][0-9]* passed' "$1"; then
    echo "No test passed." >&2
    return 1
  fi
  skipped=$(grep -E '^SKIPPED' "$1" | grep -Ev 'CUDA|GPU' || true)
  if [ -n "$skipped" ]; then
    printf 'Skipped here, where everything is installed:\n%s\n' "$skipped" >&2
    return 1
  fi
}
