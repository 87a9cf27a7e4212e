#!/bin/sh
# Training and kernels under Nsight Systems (nsys) and Nsight Compute (ncu); see docs/profiling.md.
set -eu

usage() {
    cat <<'END'
usage: benchmarks/nsight.sh [--print] CASE...

  train          nsys: timeline of ITERATIONS training iterations, after SKIP of them
  update         ncu: counters of the kernels of the update, in the same iterations
  bench OP       nsys: timeline of the suite's cases of OP, as in bench_kernels.py --only gae
  kernel OP NAME ncu: counters of the kernels named so in these cases, as in kernel gae gae_kernel

  --print        print the command lines, run nothing

Variables: ENV_ID (CartPole-v1), TRAIN_FLAGS (1024 tensor environments), SKIP (2), ITERATIONS (3),
LAUNCHES (100, kernels to measure at most), OUT (profiles, a folder), PYTHON (.venv/bin/python where it
exists, else python3).
END
}

root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
venv="$root/.venv/bin/python"
if [ -x "$venv" ]; then default_python=$venv; else default_python=python3; fi
PYTHON=${PYTHON:-$default_python}
ENV_ID=${ENV_ID:-CartPole-v1}
TRAIN_FLAGS=${TRAIN_FLAGS:---vectorization tensor --num-envs 1024 --num-steps 128 --total-timesteps 1048576}
SKIP=${SKIP:-2}
ITERATIONS=${ITERATIONS:-3}
LAUNCHES=${LAUNCHES:-100}
OUT=${OUT:-profiles}
print=no

# Imports stay outside the range.
SUITE='import sys; sys.path.insert(0, sys.argv[1]); import bench_kernels; import ppo_fast.profiling as p; '
SUITE="${SUITE}p.ranged(p.CAPTURE, bench_kernels.main)(sys.argv[2:])"

need() {
    [ "$print" = yes ] || command -v "$1" >/dev/null 2>&1 || {
        echo "nsight.sh: $1 is not on PATH; install $2 (https://developer.nvidia.com/$3)." >&2
        echo "Without it: ppo-fast profile --tool torch -- train $ENV_ID" >&2
        exit 127
    }
}

# Quoted for a shell, one line.
show() {
    line=''
    for word in "$@"; do
        case $word in
        '' | *[!A-Za-z0-9_./:=@,+-]*)
            word="'$(printf '%s' "$word" | sed "s/'/'\\\\''/g")'"
            ;;
        esac
        line="$line${line:+ }$word"
    done
    printf '%s\n' "$line"
}

run() {
    show "$@"
    [ "$print" = yes ] || {
        mkdir -p "$OUT"
        "$@"
    }
}

systems() {
    report=$1
    shift
    need nsys "Nsight Systems" nsight-systems
    run env "PPO_FAST_CAPTURE=$SKIP:$ITERATIONS" \
        nsys profile --trace=cuda,nvtx,osrt --cuda-graph-trace=node --sample=none --cpuctxsw=none \
        --capture-range=nvtx --nvtx-capture=capture@ppo_fast --capture-range-end=stop \
        --force-overwrite=true "--output=$OUT/$report" "$@"
}

compute() {
    report=$1
    range=$2
    shift 2
    need ncu "Nsight Compute" nsight-compute
    run env "PPO_FAST_CAPTURE=$SKIP:$ITERATIONS" \
        ncu --set full --target-processes all --graph-profiling node --nvtx --nvtx-include "$range" \
        --launch-count "$LAUNCHES" --force-overwrite --export "$OUT/$report" "$@"
}

# words CASE NEEDED GIVEN
words() {
    [ "$3" -gt "$2" ] || {
        echo "nsight.sh: $1 needs $2 more: an op, such as gae; for kernel also gae_kernel" >&2
        exit 2
    }
}

[ $# -gt 0 ] || {
    usage >&2
    exit 2
}
case $1 in
-h | --help)
    usage
    exit 0
    ;;
--print)
    print=yes
    shift
    ;;
esac

PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONPATH
while [ $# -gt 0 ]; do
    case $1 in
    train)
        # shellcheck disable=SC2086 # several flags
        systems train "$PYTHON" -m ppo_fast train "$ENV_ID" $TRAIN_FLAGS
        ;;
    update)
        # shellcheck disable=SC2086 # several flags
        compute update 'ppo_fast@capture/*/update' "$PYTHON" -m ppo_fast train "$ENV_ID" $TRAIN_FLAGS
        ;;
    bench)
        words bench 1 $#
        systems "bench-$2" "$PYTHON" -c "$SUITE" "$root/benchmarks" --only "$2"
        shift
        ;;
    kernel)
        words kernel 2 $#
        compute "kernel-$3" 'ppo_fast@capture/' --kernel-name "$3" \
            "$PYTHON" -c "$SUITE" "$root/benchmarks" --only "$2" --rounds 1
        shift 2
        ;;
    *)
        echo "nsight.sh: unknown case '$1'" >&2
        usage >&2
        exit 2
        ;;
    esac
    shift
done
