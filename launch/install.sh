# shellcheck shell=bash
# Sourced by demo.sh, test.sh and docker/Dockerfile: leaves $python, a Python with tokenppo, in .venv beside pyproject.toml.
# Does nothing where that is there already. PYTHON names the interpreter to start from (3.11 or newer), EXTRAS what comes
# along, by the names in pyproject.toml: the tools of the tests, unless EXTRAS is set; set to nothing, nothing. With LOCK,
# a file of docker/, exactly what that names is installed, whatever EXTRAS says.

python="$PWD/.venv/bin/python"
extras=${EXTRAS-dev}
lock=${LOCK-}
[ -z "$lock" ] || extras=
wanted="$(cat pyproject.toml ${lock:+"$lock"} | cksum)${extras:+ $extras}"

if [ "$(cat .venv/installed 2>/dev/null)" != "$wanted" ]; then
    "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
        echo "tokenppo needs Python 3.11 or newer; set PYTHON to one, this is: $("${PYTHON:-python3}" --version 2>&1)" >&2
        exit 2
    }
    # Debian and Ubuntu keep ensurepip in a package of its own; a .venv made without it is there and has no pip.
    has_pip() { "$python" -m pip --version > /dev/null 2>&1; }
    makes_environments() { "${PYTHON:-python3}" -c 'import ensurepip' 2> /dev/null; }
    if ! has_pip && ! makes_environments; then
        if [ -z "${PYTHON-}" ] && [ "$(id -u)" = 0 ] && command -v apt-get > /dev/null; then
            echo "this python3 makes no environments: apt-get install python3-venv"
            apt-get update --quiet=2
            DEBIAN_FRONTEND=noninteractive apt-get install --quiet=2 --yes --no-install-recommends python3-venv > /dev/null
        fi
        makes_environments || {
            echo "$(command -v "${PYTHON:-python3}") makes no environments; install python3-venv, or set PYTHON to one that does" >&2
            exit 2
        }
    fi
    echo "installing into .venv (2 GB with a CPU build of torch, 6 GB with a CUDA build; once)"
    if [ -n "$lock" ]; then
        bash docker/venv.sh "$lock"
        "$python" -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
    else
        [ -x "$python" ] || "${PYTHON:-python3}" -m venv .venv
        has_pip || "$python" -m ensurepip > /dev/null
        # pip would compile 23,000 files. What a run imports, a fifth of them, is compiled here: where
        # PYTHONDONTWRITEBYTECODE is set each process of each run would else do it again, ten seconds.
        pip=("$python" -m pip install --quiet --disable-pip-version-check --no-compile)
        # Without a GPU the release that this was tested with. Which build pip takes is pip's own settings' business.
        if ! command -v nvidia-smi > /dev/null; then
            "${pip[@]}" torch==2.13.0
        fi
        "${pip[@]}" --editable ".${extras:+[$extras]}"
        PYTHONDONTWRITEBYTECODE= "$python" -m launch.imports
    fi
    printf '%s\n' "$wanted" > .venv/installed
fi
# The dozens of processes of a run share what the first of them compiled of our own files.
export PYTHONDONTWRITEBYTECODE=
# What writes responses on a CPU; in a tenth of a second where it is there.
"$python" -m rollout.engines.compiler
# DeepSpeed compiles with the tools of this folder; idle threads of one process must not steal the cores of another.
export PATH="$PWD/.venv/bin:$PATH" OMP_WAIT_POLICY=PASSIVE
