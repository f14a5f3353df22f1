#!/usr/bin/env bash
# The first two runs on a machine with a card, each within ten minutes; docs/first_minutes.md says what they need.
#   benchmarks/first_card.sh check FOLDER      the GPU's tests, then the smallest of them under compute-sanitizer
#   benchmarks/first_card.sh figures FOLDER    python -m benchmarks.gpu
# What they find is in FOLDER as soon as it is found, and stays there if a run is stopped.
set -uo pipefail
run=${1:-} out=${2:-}
if [[ ! $run =~ ^(check|figures)$ || -z $out ]]; then
    echo "usage: $0 check|figures FOLDER" >&2
    exit 64
fi
mkdir -p "$out" && out=$(cd "$out" && pwd) && cd "$(dirname "$0")/.." || exit
python=${PYTHON:-python3}
card=$PWD/build/card
export PYTHONUNBUFFERED=1 PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
status=0

# limited SECONDS LOG COMMAND...: stopped after that long, and what it says is on the screen and in FOLDER/LOG.
limited() {
    echo "=== ${*:3}"
    timeout --kill-after=10 "$1" "${@:3}" 2>&1 | tee "$out/$2" || status=1
}

if [[ -d $card ]]; then
    export TRITON_CACHE_DIR=$card/triton HIDE_COMMIT=${HIDE_COMMIT:-$(cat "$card/commit")}
    cp -f "$card"/_csrc*.so hide_kernels/ 2>/dev/null || echo "no extension was carried: CuPy compiles its kernels"
    if compgen -G "$card/wheels/*.whl" >/dev/null; then
        "$python" -m pip install --quiet --no-index --no-deps --no-compile --upgrade --target build/packages \
            "$card"/wheels/*.whl && PYTHONPATH=$PYTHONPATH:$PWD/build/packages
    fi
    timeout 45 "$python" -m benchmarks.carry --check "$card" || echo "kernels are compiled anew"
else
    echo "nothing was carried in build/card: kernels are compiled anew"
fi

# Under compute-sanitizer: each kernel once, on little.
SMALLEST=(
    "tests/test_gpu.py::test_the_kernels_serve_every_kind_of_call_within_budget[plain-torch.bfloat16]"
    "tests/test_gpu.py::test_the_kernels_serve_every_kind_of_call_within_budget[every mask-torch.float32]"
    "tests/test_gpu.py::test_the_kernels_serve_packed_and_paged_batches_within_budget[paged-torch.bfloat16]"
    "tests/test_gpu.py::test_token_maps_of_every_backend_are_those_of_the_reference[triton-torch.bfloat16]"
    "tests/test_gpu.py::test_strided_maps_and_maps_that_are_not_valid[extension]"
    "tests/test_gpu.py::test_maps_to_collage_reads_the_plan_once[extension-256]"
    "tests/test_gpu.py::test_pixel_values_are_those_of_the_host_bit_for_bit[extension-[(140, 112), (224, 196)]-torch.bfloat16]"
)

if [[ $run == check ]]; then
    limited 330 tests.log "$python" -m pytest -m gpu -n 8 --verbose -p no:cacheprovider
    for tool in memcheck racecheck; do
        # Memory of its own for each tensor, or an access beyond one finds another.
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 limited 80 $tool.log compute-sanitizer --tool $tool --error-exitcode 9 \
            "$python" -m pytest -p no:cacheprovider --verbose "${SMALLEST[@]}"
    done
else
    limited 540 figures.log "$python" -m benchmarks.gpu --seconds 500 --out "$out"
fi
exit $status
