#!/usr/bin/env bash
# Sets up one node: a virtual environment with MiniMind Ray at exactly the versions of requirements.txt.
#
#     bash ~/minimind-ray/cluster/setup.sh
#
# The cluster files run it on every node, from the files that their `file_mounts` copied there. Run again it
# does nothing, unless the code, the versions or the interpreter changed. Set for another place or interpreter:
#     MINIMIND_VENV   the virtual environment          (default: ~/minimind-ray-venv)
#     MINIMIND_STORAGE   where runs, sweeps and prepared data go: a folder that all nodes see, or a URL
#     PYTHON          Python 3.11 or newer, the same on all nodes (default: python3)
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${MINIMIND_VENV:-$HOME/minimind-ray-venv}
python=${PYTHON:-python3}
token=$HOME/.ray/auth_token

fail() {
    echo "setup.sh on $(hostname): $1" >&2
    exit 1
}

as_root() {
    if [ "$(id -u)" -eq 0 ]; then "$@"; else sudo -n "$@"; fi
}

# On a fresh machine the system's own update holds the lists, and `apt-get update` gives up at once.
update_lists() {
    local said
    for _ in {1..60}; do
        said=$(as_root apt-get update -qq 2>&1) && return
        [[ $said == */lists/lock* ]] || break
        sleep 5
    done
    fail "apt-get update: ${said//$'\n'/ }; install python$minor-venv by hand, or set PYTHON"
}

# Without the token this node's Ray would refuse all others.
if [ -s "$token" ]; then
    chmod 600 "$token"
elif [ -z "${RAY_AUTH_TOKEN:-}" ]; then
    fail "no $token; make one where you run \`ray up\` (ray get-auth-token --generate) and keep its line in file_mounts"
fi

command -v "$python" >/dev/null || fail "no $python; install Python 3.11 or newer, or set PYTHON"
version=$("$python" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])')
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    fail "$python is $version and 3.11 or newer is needed; take a newer image, or set PYTHON"

# What the environment was made of, as one hash.
made_of=$({
    echo "$version"
    cd "$root" && cat pyproject.toml setup.py cluster/requirements.txt
    find minimind_ray experiments -type f ! -name '*.pyc' -print0 | LC_ALL=C sort -z | xargs -0 sha256sum
} | sha256sum)

if [ "$(cat "$venv/.made-of" 2>/dev/null)" != "$made_of" ]; then
    if [ ! -x "$venv/bin/python" ]; then
        # Debian and Ubuntu keep what `venv` needs in a package of its own.
        if ! "$python" -c 'import ensurepip' 2>/dev/null; then
            minor=${version%.*}
            update_lists
            as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq -o DPkg::Lock::Timeout=300 \
                "python$minor-venv" >/dev/null || fail "install python$minor-venv by hand, or set PYTHON"
        fi
        "$python" -m venv "$venv"
    fi
    pip=("$venv/bin/python" -m pip --disable-pip-version-check install --quiet --retries 10)
    "${pip[@]}" --requirement "$root/cluster/requirements.txt"
    "${pip[@]}" --no-deps --no-build-isolation --force-reinstall "$root"
    echo "$made_of" >"$venv/.made-of"
fi

# For every shell on this node, those of `ray exec` and `ray attach` too. First in .bashrc: Ubuntu's leaves early.
cat >"$venv/cluster.env" <<EOF
export PATH="$venv/bin:\$PATH" RAY_AUTH_MODE=\${RAY_AUTH_MODE:-token} RAY_USAGE_STATS_ENABLED=0
export MINIMIND_STORAGE=\${MINIMIND_STORAGE:-${MINIMIND_STORAGE:-}}
# What is run here by hand uses the cluster; not \`ray start\`, which would look for it here.
if [ -e /tmp/ray/ray_current_cluster ]; then export RAY_ADDRESS=\${RAY_ADDRESS:-auto}; fi
EOF
# Images of one distribution differ in Python's last number, for which Ray would turn a node away.
echo 'export RAY_DEFAULT_PYTHON_VERSION_MATCH_LEVEL=minor' >>"$venv/cluster.env"
line=". \"$venv/cluster.env\""
touch "$HOME/.bashrc"
grep -qxF "$line" "$HOME/.bashrc" || printf '%s\n%s\n' "$line" "$(cat "$HOME/.bashrc")" >"$HOME/.bashrc"

echo "$(hostname): MiniMind Ray in $venv, Python $version"
