#!/usr/bin/env bash
# Everything that needs a GPU, in one run of at most ten minutes: `bash bench/gpu_check.sh [FOLDER]`.
# What it finds lies in FOLDER (gpu-check): a log of each part, summary.txt, cuda.json, cuda.png and
# the demo's report. PYTHON names an interpreter with a torch that has CUDA. One part that fails
# stops no other; the exit status is that of the worst. Where there is no network, pip's own settings
# say where packages lie: PIP_NO_INDEX=1 PIP_FIND_LINKS=FOLDER.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

out=$(realpath -m "${1:-gpu-check}")
python=${PYTHON:-python3}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
mkdir -p "$out"
: >"$out/summary.txt"
status=0
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}

# part NAME SECONDS COMMAND...
part() {
  local name=$1 limit=$2 start=$SECONDS code=0
  shift 2
  timeout --kill-after=10 "$limit" "$@" >"$out/$name.txt" 2>&1 || code=$?
  if ((code > status)); then status=$code; fi
  printf '%-8s status %3d  %4d s  %s\n' "$name" "$code" "$((SECONDS - start))" \
    "$(tail -n 1 "$out/$name.txt" | cut -c 1-150)" | tee -a "$out/summary.txt"
}

part machine 15 nvidia-smi
needed='pybind11, cmake, ninja, zstandard, pytest, pytest_benchmark, hypothesis, matplotlib, psutil, rich, safetensors, torchdata'
"$python" -c "import $needed" 2>/dev/null || part install 45 "$python" -m pip install -q \
  --disable-pip-version-check pybind11 cmake ninja zstandard 'pytest>=9' pytest-benchmark \
  hypothesis matplotlib psutil rich safetensors torchdata
part build 90 "$python" setup.py build_ext --inplace
part torch 20 "$python" -c 'import torch; print(torch.__version__, torch.cuda.get_device_name())'
mapfile -t marked < <(grep -l 'mark\.cuda' tests/test_*.py)
part tests 90 "$python" -m pytest -q -m cuda -p no:cacheprovider "${marked[@]}"
part demo 60 "$python" -m pysnap demo --quick --device cuda --out "$out/demo"
part bench 280 "$python" bench/bench_cuda.py --check --dir "$scratch" --out "$out" ${BENCH_OPTIONS-}
if ((status != 0)); then tail -n 40 "$out"/{install,build,tests,demo}.txt | tail -c 6000; fi
sed -n '/GB\/s/,$p' "$out/bench.txt"
exit "$status"
