#!/bin/sh
# Installs torch into the Python given. Without an NVIDIA GPU the CPU build is taken, which is a tenth of the CUDA build's size:
# from the configured index if it has one, else from PyTorch's own CPU index, and only then whatever the index offers.
set -u
python=$1
version=2.13.0
pip="$python -m pip install --quiet --disable-pip-version-check --no-compile"

if "$python" -c 'import torch' 2>/dev/null; then
    exit 0
fi
if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi >/dev/null 2>&1; then
    exec $pip 'torch>=2.11'
fi
$pip "torch==$version+cpu" 2>/dev/null && exit 0
$pip --retries 1 --timeout 15 --index-url "${TORCH_CPU_INDEX:-https://download.pytorch.org/whl/cpu}" "torch==$version" && exit 0
echo 'No CPU build of torch could be had; installing the default build.' >&2
exec $pip 'torch>=2.11'
