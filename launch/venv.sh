# shellcheck shell=bash
# Sourced by launch/local.sh, worker.sh, gcp.sh, skypilot.yaml and tests/run.sh: the clone's virtual environment.
#
#   ensure_venv EXTRAS [OPTION...]   makes CLONE/.venv with this package and its EXTRAS ("" for none) installed, by pip
#                                    with these options, unless it is there already; afterwards $venv_python is its
#                                    Python and $clone the directory of the clone.
#   ensure_python                    installs a Python that is new enough where there is none; on machines of a cloud only
#   machine_extras                   prints the extras that suit this machine's accelerator and a workdir in a bucket
#
# PYTHON in the environment names the Python to build with; else the newest of python3.13, 3.12, 3.11 and python3 that runs.

clone="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
venv="$clone/.venv"
venv_python="$venv/bin/python"

say() { printf 'mae_dist: %s\n' "$*" >&2; }

fail() {
    say "error: $*"
    exit 1
}

# A candidate is run rather than looked up: a pyenv shim is on PATH even when the version behind it is not installed.
is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

version_of() { "$1" -c 'import platform; print(platform.python_version())' 2>/dev/null || echo "not runnable"; }

find_python() {
    local candidate
    if [[ -n "${PYTHON:-}" ]]; then
        is_new_enough "$PYTHON" ||
            fail "PYTHON=$PYTHON is $(version_of "$PYTHON"), but Python 3.11 or newer is needed. Set PYTHON to such a Python, or unset it."
        echo "$PYTHON"
        return
    fi
    for candidate in python3.13 python3.12 python3.11 python3 python; do
        if is_new_enough "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    fail "no Python 3.11 or newer found (tried python3.13, python3.12, python3.11, python3, python)." \
        "Install one (Debian, Ubuntu: sudo apt-get install python3.11 python3.11-venv) or set PYTHON=/path/to/python3."
}

ensure_python() {
    local python version
    if is_new_enough "$venv_python"; then
        return
    elif python="$(find_python 2>/dev/null)"; then
        "$python" -c 'import ensurepip' 2>/dev/null && return
        version="$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')"
        # The lock: at its first boot a machine may be busy with updates.
        sudo apt-get update -qq
        sudo apt-get install -qq -y -o DPkg::Lock::Timeout=300 "python$version-venv"
    else
        # Ubuntu 22.04, as on TPU machines, has Python 3.10, and of 3.11 only a release candidate.
        say "bringing Python 3.12"
        python3 -m pip install --quiet --user uv
        python3 -m uv python install --quiet 3.12
        PYTHON="$(python3 -m uv python find 3.12)"
        export PYTHON
    fi
}

# libtpu names no TPU before JAX has started it; these are the devices of its chips.
machine_extras() {
    if nvidia-smi -L >/dev/null 2>&1; then
        echo cuda12,gcs
    elif compgen -G "/dev/accel[0-9]*" >/dev/null || compgen -G "/dev/vfio/[0-9]*" >/dev/null; then
        echo tpu,gcs
    else
        echo gcs
    fi
}

# Whether its Python runs and is its own: without .venv/pyvenv.cfg it would install into the Python it was made from.
is_own_python() {
    is_new_enough "$venv_python" &&
        "$venv_python" -c 'import os, sys; sys.exit(not os.path.samefile(sys.prefix, sys.argv[1]))' "$venv" 2>/dev/null
}

# The environment is usable if its Python and its pip both run and no earlier install was cut short in the middle:
# pip may then have left packages that look installed and are not whole.
is_usable() {
    local installer
    [[ -d "$venv" ]] || return 1
    if [[ -e "$venv/installing" ]]; then
        installer="$(<"$venv/installing")"
        if [[ "$installer" =~ ^[0-9]+$ ]] && kill -0 "$installer" 2>/dev/null; then
            fail "process $installer is installing into $venv now. Wait for it; if it is something else, delete $venv/installing."
        fi
        say "an earlier install into $venv was interrupted: starting afresh"
        return 1
    fi
    if ! is_own_python || ! "$venv_python" -m pip --version >/dev/null 2>&1; then
        say "$venv is incomplete: starting afresh"
        return 1
    fi
    if [[ -n "${PYTHON:-}" && "$(version_of "$PYTHON")" != "$(version_of "$venv_python")" ]]; then
        say "$venv has Python $(version_of "$venv_python") and PYTHON=$PYTHON is $(version_of "$PYTHON"): starting afresh"
        return 1
    fi
}

create_venv() {
    local python="$1"
    "$python" -c 'import venv, ensurepip' 2>/dev/null ||
        fail "$python ($(version_of "$python")) cannot make virtual environments: its venv or ensurepip module is missing." \
            "Debian, Ubuntu: sudo apt-get install python$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')-venv"
    say "making $venv with Python $(version_of "$python")"
    "$python" -m venv --clear "$venv" || fail "making $venv failed (see above)."
}

# What an install depends on: changed requirements, another Python or a clone that was moved mean installing again.
install_digest() {
    "$venv_python" -c '
import hashlib, pathlib, sys
root, python = sys.argv[1], sys.version
text = pathlib.Path(root, "pyproject.toml").read_bytes()
print(hashlib.sha256(b"\0".join([text, root.encode(), python.encode()])).hexdigest())' "$clone"
}

ensure_venv() {
    local extras="$1" python digest stamp
    shift
    if ! is_usable; then
        python="$(find_python)"
        create_venv "$python"
    fi
    digest="$(install_digest)"
    # An install of more extras has everything that one of fewer has: "installed-test,parity" is enough for "test".
    for stamp in "$venv/installed${extras:+-$extras}"*; do
        [[ -e "$stamp" && "$(<"$stamp")" == "$digest" ]] && return
    done
    say "installing mae_dist${extras:+[$extras]} and what it needs into $venv (once; some minutes)"
    echo "$$" >"$venv/installing"
    # pip reports each package to the error output: the output of a script is its program's.
    "$venv_python" -m pip install "$@" --disable-pip-version-check --editable "$clone${extras:+[$extras]}" >&2 ||
        fail "the install failed (see above). The same command tries again from the start."
    echo "$digest" >"$venv/installed${extras:+-$extras}"
    rm "$venv/installing"
}
