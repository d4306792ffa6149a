#!/usr/bin/env bash
# Creates .venv from requirements.lock. It skips what is already installed, so a second run takes a moment.
#
#   scripts/setup.sh           system packages (apt), uv, the virtual environment
#   scripts/setup.sh uv ARGS   run uv, which is installed first if it is missing
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly LOCK=requirements.lock
readonly PYTHON_RANGE='>=3.11,<3.14'
readonly MIN_UV=0.8.0
readonly STAMP=.venv/.setup-finished
readonly APT_INSTALL=(apt-get install -y --no-install-recommends)

say() { printf 'setup: %s\n' "$*" >&2; }

fail() {
    printf 'setup: %s\n' "$@" >&2
    exit 1
}

# Prints a digest of the environment's inputs and folder: console scripts hold absolute paths, so a move needs a new setup.
environment_key() { { cat "$LOCK" scripts/setup.sh && pwd; } | sha256sum | cut -d' ' -f1; }

# FFCV's extension is linked against the system's OpenCV, so an upgrade of the system can break it.
extension_loads() {
    .venv/bin/python - <<'PYTHON' >/dev/null 2>&1
import ctypes, pathlib, sysconfig
[extension] = pathlib.Path(sysconfig.get_path("platlib"), "ffcv").glob("_libffcv*.so")
ctypes.CDLL(str(extension))
PYTHON
}

is_finished() { [[ -f $STAMP && $(<"$STAMP") == "$(environment_key)" ]] && extension_loads; }

# ---------------------------------------------------------------------------------------------- system packages

as_root() {
    if [[ $EUID -eq 0 ]]; then
        env DEBIAN_FRONTEND=noninteractive "$@" </dev/null
    else
        sudo -n env DEBIAN_FRONTEND=noninteractive "$@" </dev/null
    fi
}

may_use_apt() { command -v apt-get >/dev/null && { [[ $EUID -eq 0 ]] || sudo -n true 2>/dev/null; }; }

python_in_range() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null; }

# Prints the folder for a Python's headers, which Debian ships in a separate package.
include_folder() { "$1" -c 'import sysconfig; print(sysconfig.get_config_var("INCLUDEPY"))'; }

# Prints the missing packages by Debian's and Ubuntu's names. It looks for tools, not packages: any compiler will do.
missing_packages() {
    command -v make >/dev/null || echo make
    command -v cc >/dev/null && command -v c++ >/dev/null || echo g++
    command -v pkg-config >/dev/null || echo pkg-config
    pkg-config --exists opencv4 2>/dev/null || echo libopencv-dev
    pkg-config --exists libturbojpeg 2>/dev/null || echo libturbojpeg0-dev
    if ! command -v python3 >/dev/null; then
        printf '%s\n' python3 python3-dev
    elif python_in_range python3 && [[ ! -f $(include_folder python3)/Python.h ]]; then
        echo python3-dev
    fi
    if [[ -z $(usable_uv) ]] && ! python3 -m pip --version >/dev/null 2>&1; then
        echo python3-pip
    fi
}

install_packages() {
    local packages=("$@") log=.tools/apt.log
    if ! may_use_apt; then
        fail "missing system packages: ${packages[*]}" \
            "FFCV is built against them. Install them and run this again (the names are Debian's and Ubuntu's):" \
            "    sudo apt-get update && sudo ${APT_INSTALL[*]} ${packages[*]}"
    fi
    say "installing system packages: ${packages[*]} (log: $log)"
    # The package lists of a new machine are empty or old; elsewhere they need no update.
    if ! as_root "${APT_INSTALL[@]}" -o DPkg::Lock::Timeout=300 "${packages[@]}" >"$log" 2>&1; then
        as_root apt-get update >>"$log" 2>&1 || true
        as_root "${APT_INSTALL[@]}" -o DPkg::Lock::Timeout=300 "${packages[@]}" >>"$log" 2>&1 ||
            fail "apt-get could not install ${packages[*]}; the end of $log:" "$(tail -n 15 "$log")"
    fi
}

ensure_packages() {
    local missing
    mapfile -t missing < <(missing_packages)
    [[ ${#missing[@]} -eq 0 ]] || install_packages "${missing[@]}"
}

# --------------------------------------------------------------------------------------------------- uv and .venv

is_usable_uv() {
    local version
    version=$("$1" --version 2>/dev/null | awk '{print $2}') && [[ -n $version ]] &&
        [[ $(printf '%s\n' "$MIN_UV" "$version" | sort -V | head -n 1) == "$MIN_UV" ]]
}

# Prints the path of a uv that is new enough, or nothing.
usable_uv() {
    local candidate
    for candidate in "$(command -v uv || true)" .tools/uv/bin/uv; do
        if [[ -n $candidate ]] && is_usable_uv "$candidate"; then
            echo "$candidate"
            return
        fi
    done
}

# uv comes from the lock too. `--target` also works if Python is externally managed.
ensure_uv() {
    [[ -z $(usable_uv) ]] || return 0
    say "installing uv into .tools"
    rm -rf .tools/uv
    awk '/^[^ #]/ { in_uv = /^uv==/ } in_uv' "$LOCK" >.tools/uv.txt
    PIP_ROOT_USER_ACTION=ignore python3 -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes \
        --target .tools/uv -r .tools/uv.txt ||
        fail "could not install uv with 'python3 -m pip'; see above, or put uv $MIN_UV or newer on PATH"
    [[ -n $(usable_uv) ]] || fail "the uv in .tools does not run on this machine; put uv $MIN_UV or newer on PATH"
}

# Always creates a new one: packages that an interrupted setup half wrote look installed, and uv's cache makes it quick.
make_venv() {
    rm -rf "$STAMP" .venv
    "$(usable_uv)" venv --quiet --python "$PYTHON_RANGE" .venv ||
        fail "uv found no Python $PYTHON_RANGE and could not download one; install python3.11, python3.12 or python3.13"
    local include
    include=$(include_folder .venv/bin/python)
    [[ -f $include/Python.h ]] || install_packages "${include##*/}-dev"
}

sync_venv() {
    # The lock also constrains what builds FFCV: the build environment is as fixed as the environment itself.
    "$(usable_uv)" pip sync --quiet --python .venv/bin/python --require-hashes \
        --build-constraints "$LOCK" --require-build-hashes "$LOCK" "$@"
}

main() {
    if is_finished; then
        return
    fi
    mkdir -p .tools
    exec 9>.tools/setup.lock
    flock 9 # if two makes run at once, the second waits and finds the work done
    if is_finished; then
        return
    fi
    ensure_packages
    ensure_uv
    make_venv
    say "installing $LOCK into .venv (about 6 GB; FFCV is compiled)"
    sync_venv || fail "the installation failed; see above, then run this again"
    if ! extension_loads; then
        say "FFCV does not load; building it again for this machine's OpenCV"
        "$(usable_uv)" cache clean --quiet ffcv
        sync_venv --reinstall-package ffcv
        extension_loads || fail "FFCV does not load:" "$(.venv/bin/python -c 'import ffcv._libffcv' 2>&1 | tail -n 1)"
    fi
    environment_key >"$STAMP.tmp"
    mv "$STAMP.tmp" "$STAMP"
    say "the environment is ready: .venv ($(.venv/bin/python --version))"
}

if [[ ${1:-} == uv ]]; then
    shift
    mkdir -p .tools
    ensure_uv
    exec "$(usable_uv)" "$@"
fi
main
