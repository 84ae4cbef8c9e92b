#!/usr/bin/env bash
# One clear line for everything the set-up needs and does not find.
set -u
python=${PYTHON:-python3}
missing=()
command -v g++ >/dev/null || missing+=(g++)
if ! command -v "$python" >/dev/null; then
    missing+=(python3 python3-venv)
elif ! "$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))'; then
    echo "error: $("$python" --version) found, Python 3.11 or 3.12 is needed; choose one with: make PYTHON=python3.12 …" >&2
    exit 1
elif ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
    missing+=(python3-venv)
fi
header=$("$python" -c 'import os, sysconfig; print(os.path.join(sysconfig.get_paths()["include"], "Python.h"))' 2>/dev/null)
[ -n "$header" ] && [ ! -f "$header" ] && missing+=(python3-dev)
if [ ${#missing[@]} -gt 0 ]; then
    echo "error: missing: ${missing[*]}; on Debian or Ubuntu: sudo apt-get install ${missing[*]}" >&2
    exit 1
fi
free_kib=$(df -Pk . | awk 'NR==2 {print $4}')
if [ "${free_kib:-0}" -lt 6291456 ]; then
    echo "error: $((free_kib / 1024)) MiB free on this disk, the environment needs 6 GiB" >&2
    exit 1
fi
