#!/bin/sh
# The compile gate under each Triton that torch 2.11 to 2.15 bring, tables to the screen and JSON to out/gate. No GPU needed.
#   scripts/gate.sh PYTHON [TRITON_VERSION ...]        PYTHON has torch and tessera
# TRITONS: where the Tritons are kept (out/gate); WORDS: only variants whose names hold all of these; JOBS: processes (2);
# EVERY: only every N-th of each kernel's (1); SHARE: which of these N shares, modulo N (0).
set -eu
python=$1
shift
[ $# -gt 0 ] || set -- 3.6.0 3.7.1 3.8.0 3.9.0
out=out/gate
tritons=${TRITONS:-$out}
mkdir -p "$out" "$tritons"
installed=$("$python" -c 'from importlib.metadata import version; print(version("triton"))' 2>/dev/null || true)
failed=0
for version in "$@"; do
    folder=$tritons/triton-$version
    if [ ! -d "$folder" ] && [ "$version" != "$installed" ]; then
        rm -rf "$folder.new"
        "$python" -m pip install --quiet --disable-pip-version-check --no-compile --no-deps --target "$folder.new" "triton==$version"
        mv "$folder.new" "$folder"
    fi
    # What Triton writes to stderr when it ends (leak reports of its bindings from 3.9 on) is shown only for a failure.
    if ! PYTHONPATH=$folder${PYTHONPATH:+:$PYTHONPATH} "$python" -m tessera.jit.gate --jobs "${JOBS:-2}" \
        --every "${EVERY:-1}" --share "${SHARE:-0}" \
        --json "$out/triton-$version.json" ${WORDS:-} 2>"$out/triton-$version.log"; then
        tail -n 30 "$out/triton-$version.log" >&2
        failed=1
    fi
done
exit $failed
