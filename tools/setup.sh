#!/usr/bin/env bash
# Installs what LOTUS needs and is missing: Debian's packages that FFCV is built with, then the Python side in .venv.
# A second run with nothing changed ends at once. FFCV=no leaves FFCV out (the plain torch loader is slower).
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${VENV:-.venv} python=${PYTHON:-python3} ffcv=${FFCV:-yes}
extras=dev,docs,onnx,scale; [ "$ffcv" = no ] || extras=ffcv,$extras
say() { printf '\033[2msetup:\033[0m %s\n' "$*"; }
die() { printf 'setup: %s\n' "$*" >&2; exit 2; }

stamp=$( (echo "$extras"; cat pyproject.toml constraints.txt "$0"; grep ^__version__ lotus/__init__.py) | sha256sum | cut -c1-32)
[ "$(cat "$venv/.lotus" 2>/dev/null)" = "$stamp" ] && exit 0

# 1. A Python that fits: the one named, else the newest of those that are here.
fits() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null; }
if ! fits "$python"; then
    for candidate in python3.13 python3.12 python3.11; do fits $candidate && { python=$candidate; break; }; done
    fits "$python" || die "Python 3.11 to 3.13 is needed, '$python' is not one. Install it, or: make PYTHON=/path/to/python3.11 ..."
fi

# 2. What the compiler and the virtual environment need from the system.
missing=()
"$python" -c 'import ensurepip, venv' 2>/dev/null || missing+=(python3-venv)
"$python" -c 'import os, sysconfig; os.stat(sysconfig.get_path("include") + "/Python.h")' 2>/dev/null || missing+=(python3-dev)
command -v g++ >/dev/null || missing+=(g++)
if [ "$ffcv" != no ]; then
    command -v pkg-config >/dev/null || missing+=(pkg-config)
    pkg-config --exists opencv4 2>/dev/null || missing+=(libopencv-dev)
    pkg-config --exists libturbojpeg 2>/dev/null || missing+=(libturbojpeg0-dev)
fi
if [ ${#missing[@]} -gt 0 ]; then
    sudo=; [ "$(id -u)" = 0 ] || sudo="sudo -n"
    if command -v apt-get >/dev/null && { [ -z "$sudo" ] || $sudo true 2>/dev/null; }; then
        say "installing ${missing[*]} with apt"
        log=$(mktemp)
        { $sudo apt-get update -q && DEBIAN_FRONTEND=noninteractive $sudo apt-get install -qy --no-install-recommends "${missing[@]}"; } >"$log" 2>&1 ||
            { tail -n 15 "$log" >&2; die "apt could not install ${missing[*]}"; }
        rm -f "$log"
    else
        if command -v apt-get >/dev/null; then line="sudo apt-get install -y ${missing[*]}"
        elif command -v dnf >/dev/null; then line="sudo dnf install -y gcc-c++ python3-devel pkgconf-pkg-config opencv-devel turbojpeg-devel"
        elif command -v brew >/dev/null; then line="brew install pkg-config opencv jpeg-turbo"
        else line="conda install -y -c conda-forge pkg-config libopencv libjpeg-turbo cxx-compiler"; fi
        die "missing: ${missing[*]}. Run this, then the same command again:
    $line
(or go without FFCV, with a slower loader: FFCV=no make ...)"
    fi
fi

# 3. The Python side, at the versions that were tested.
say "installing torch, timm, DeepSpeed and the rest into $venv (about 6 GB; some minutes, once)"
rm -f "$venv/.lotus"
[ -x "$venv/bin/python" ] && fits "$venv/bin/python" || { rm -rf "$venv"; "$python" -m venv "$venv"; }
"$venv/bin/python" -m pip install --disable-pip-version-check -q -e ".[$extras]" -c constraints.txt
"$venv/bin/python" -m lotus doctor --brief || die "the machine is not fit yet; see above"
echo "$stamp" >"$venv/.lotus"
say "done"
