#!/usr/bin/env bash
# The papers' tables: literal commands, one line per run; finished runs are skipped.
#
#   ./benchmark.sh TABLE               run it here; Ctrl-C saves, the same line continues
#   ./benchmark.sh TABLE --print       list its commands, for parallel, xargs or job arrays
#   JOBS=4 ./benchmark.sh TABLE        four runs at a time, the cores shared among them
#   ./benchmark.sh TABLE --slurm       one SLURM array job, JOBS runs at a time
#   python report.py runs --table TABLE   beside the paper; without --table: ablations, local
#
# TABLE: fisher_brc_table1 brac_plus_table1 arq_table2 itrpo_table2 itrpo_table3 ablations local.
# Variables: SEEDS="0 1 2" (default: as many as the paper's), OUT=runs, FLAGS="--compile" (added to
# every command), SBATCH_FLAGS="--gres=gpu:1 --time=1-0" (for --slurm). Many machines, one folder:
#   ./benchmark.sh TABLE --print | parallel --sshloginfile hosts --workdir "$PWD" --jobs 1
set -euo pipefail

JOBS=${JOBS:-1} OUT=${OUT:-runs} FLAGS=${FLAGS:-}

each() { # "DATASETS" FILE FLAGS...: one command per dataset and seed
    local env seed
    for env in $1; do
        for seed in $seeds; do
            echo python algorithms/"$2" --env "$env" --seed "$seed" "${@:3}" --out "$OUT" --resume $FLAGS
        done
    done
}

name() { # VERSION "TASKS" "LEVELS": every task-level-version
    local task level
    for level in $3; do for task in $2; do echo "$task-$level-$1"; done; done
}

commands() {
    local gym="halfcheetah hopper walker2d" hand="pen hammer door relocate" file level tau
    local maze="umaze umaze-diverse medium-play medium-diverse large-play large-diverse"
    case $1 in
    fisher_brc_table1)
        seeds=${SEEDS:-0 1 2 3 4}
        data=$(name v0 "$gym" "random medium expert medium-expert medium-replay")
        each "$data" bc.py
        each "$data" brac.py --name p --no-value-penalty
        each "$data" brac.py --name v --value-penalty
        each "$data" cql.py
        each "$data" fisher_brc.py
        ;;
    brac_plus_table1) # the ACML paper's; the tables of the ICLR submission are lost
        seeds=${SEEDS:-0 1 2}
        data=$(name v0 "$gym" "random medium medium-expert medium-replay")
        each "$data" bc.py
        each "$data" brac.py --name p --no-value-penalty
        each "$data" brac.py --name v --value-penalty
        each "$data" cql.py
        each "$data" brac_plus.py --name acml --version acml
        ;;
    arq_table2) # by dataset, as table A.4; Robomimic has no reader here
        seeds=${SEEDS:-0 1 2}
        data=$(name v2 "$gym" "expert medium medium-expert medium-replay")
        data+=" $(name v0 "$hand" "human cloned") $(name v0 kitchen "complete partial mixed")"
        data+=" $(name v0 antmaze "$maze")"
        for file in bc td3_bc cql iql arq; do each "$data" $file.py; done
        each "$data" arq.py --name qbeta --value sarsa --q-lr 1e-4
        ;;
    itrpo_table2)
        seeds=${SEEDS:-0 1 2 3}
        data=$(name v2 "$gym" "random medium medium-replay medium-expert expert")
        for file in td3_bc iql cql itrpo; do each "$data" $file.py; done
        ;;
    itrpo_table3)
        seeds=${SEEDS:-0 1 2 3}
        data=$(name v2 antmaze "$maze")
        for file in td3_bc iql cql itrpo; do each "$data" $file.py; done
        ;;
    ablations)
        seeds=${SEEDS:-0 1 2}
        for level in 0 0.01 0.1 1 10; do
            each "hopper-medium-v0 walker2d-medium-v0" fisher_brc.py --name "lam$level" --lam $level
        done
        for tau in 0 0.3 0.6 0.9; do # each with the unshaped method that has the same limit
            data="hopper-medium-v2 halfcheetah-medium-replay-v2"
            each "$data" itrpo.py --name "tau$tau" --shape-coef $tau --ratio-min=-inf
            each "$data" itrpo.py --name "control$tau" --shape-coef $tau --control
        done
        data="hopper-medium-replay-v0 walker2d-medium-expert-v0 halfcheetah-medium-v0"
        each "$data" brac_plus.py
        each "$data" brac_plus.py --name mmd --divergence mmd
        each "$data" brac_plus.py --name global --multiplier global
        each "$data" brac_plus.py --name no-penalty --lam 0
        data="hopper-medium-replay-v2 antmaze-medium-play-v0"
        each "$data" arq.py
        each "$data" arq.py --name qbeta --value sarsa --q-lr 1e-4
        each "$data" arq.py --name no-value --value none
        ;;
    local) # the bundled dataset: no network
        seeds=${SEEDS:-0 1 2 3 4} data=hopper-replay-demo
        each $data bc.py --name top10 --top 0.1
        for file in bc td3_bc sac_bc awr iql cql brac fisher_brc brac_plus itrpo arq; do
            each $data $file.py
        done
        ;;
    *) return 1 ;;
    esac
}

one() { # COMMAND: run it, its output in a log; a failure stops no other run
    local log status=0
    log=$OUT/logs/$(tr -cs '[:alnum:].-' _ <<<"${1#python algorithms/}").log
    $1 >>"$log" 2>&1 || status=$?
    case $status in
    0) echo "finished: $1" ;;
    130) echo "stopped, saved: $1" && exit 255 ;; # 255 tells xargs to start no more
    *) echo "FAILED ($status): $1, see $log" | tee -a "$OUT/logs/failed" ;;
    esac
}

cd "$(dirname "$0")"
if [[ ${1:-} == --one ]]; then one "$2" && exit; fi
list=$(commands "${1:-}") || {
    sed -n '2,/^set/{/^#/s/^# \{0,1\}//p;}' "$0"
    [[ -z ${1:-} ]] || echo "no table $1: give one of those above" >&2
    exit 2
}
refuse() { echo "$1" >&2 && exit 2; }
[[ ${2:-} =~ ^(--print|--slurm)?$ ]] || refuse "$2 is unknown: --print or --slurm"
[[ $JOBS =~ ^[1-9][0-9]*$ ]] || refuse "JOBS is '$JOBS': give a whole number, 1 or above"
[[ ${SEEDS-0} =~ ^\ *[0-9]+(\ +[0-9]+)*\ *$ ]] || refuse "SEEDS is '$SEEDS': give whole numbers"
if [[ ${2:-} == --print ]]; then echo "$list" && exit; fi
mkdir -p "$OUT/logs" && rm -f "$OUT/logs/failed"
export OUT JOBS
if [[ ${2:-} == --slurm ]]; then
    echo "$list" >"$OUT/logs/$1.txt"
    exec sbatch ${SBATCH_FLAGS:-} --job-name "$1" --array "1-$(wc -l <"$OUT/logs/$1.txt")%$JOBS" \
        --output "$OUT/logs/%x_%a.slurm" \
        --wrap "exec bash benchmark.sh --one \"\$(sed -n \${SLURM_ARRAY_TASK_ID}p $OUT/logs/$1.txt)\""
fi
cores=$(getconf _NPROCESSORS_ONLN)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > JOBS ? cores / JOBS : 1))}
trap 'echo "stopped; ./benchmark.sh '"$1"' continues"; exit 130' INT
echo "$list" | tr '\n' '\0' | xargs -0 -n 1 -P "$JOBS" bash "$0" --one || stopped=1
if [[ ${stopped:-} ]]; then echo "stopped; ./benchmark.sh $1 continues" && exit 130; fi
if [[ -s $OUT/logs/failed ]]; then echo "failed runs:" && cat "$OUT/logs/failed" && exit 1; fi
