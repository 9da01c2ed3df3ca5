#!/usr/bin/env bash
# The papers' tables and our own, as literal commands: one line for each run. Finished runs are
# skipped, and runs that were stopped continue (those of the table corl start again).
#
#   ./benchmark.sh TABLE           run it here; Ctrl-C saves, and the same command continues
#   ./benchmark.sh TABLE --print   list its commands, for parallel, xargs or job arrays
#   ./benchmark.sh TABLE --slurm   submit one SLURM array job, JOBS runs at a time
#   python tools/report.py runs    its results; --table TABLE sets them beside a paper's, for
#                                  modern, ogbench and the tables that are named after a paper
#
# TABLE            what it runs                                                    seeds
# local            every algorithm on three bundled datasets: 176 runs               3, 5
# local_ablations  what the papers of four methods of local add, taken out or changed  3
# published        rows of published tables on data that data/make/d4rl.py makes      2 to 5
# corl             CORL's own TD3+BC on the datasets of local                        3, 5
# modern           TD3+BC, IQL, ReBRAC and FQL on D4RL, as their papers do             5
# ogbench          BC, IQL, ReBRAC and FQL on OGBench's default tasks, as FQL's paper  8
# ablations        the ablations of the papers of Fisher-BRC, iTRPO, BRAC+ and ARQ     3
# fisher_brc_table1 brac_plus_table1 arq_table2 itrpo_table2 itrpo_table3    the paper's
# The runs of local take half a minute to 10 minutes each, together 8 and a half hours of one core (AMD
# EPYC, Zen 5). Those of the papers' tables train for a million steps.
#
# Variables:
#   SEEDS="0 1 2"             these seeds instead
#   DATA=hopper-replay-demo   only this dataset of the table
#   JOBS=4                    four runs at a time, which share the cores; the default is 1
#   OUT=runs                  folder of the runs
#   FLAGS="--compile"         added to every command as a shell reads it; CORL's is not compiled
#   CORL=../CORL              checkout of github.com/tinkoff-ai/CORL at 6afec90, for the table corl
#   SBATCH_FLAGS="--gres=gpu:1 --cpus-per-task=4 --time=1-0"    for --slurm
# Runs side by side need one thread each. Many machines with one folder:
#   ./benchmark.sh TABLE --print | sed 's/^/OMP_NUM_THREADS=1 /' |
#       parallel --sshloginfile hosts --workdir "$PWD" --jobs 1
set -feuo pipefail
JOBS=${JOBS:-1} OUT=${OUT:-runs} FLAGS=${FLAGS:-} DATA=${DATA:-}

refuse() { echo "$1" >&2 && exit 2; }

quoted() { # TEXT as one word of the shell
    [[ $1 =~ [^A-Za-z0-9_./:+,-] ]] && echo "'${1//\'/\'\\\'\'}'" || echo "$1"
}

each() { # "DATASETS" FILE FLAGS...: one command per dataset and seed
    local env seed place=algorithms end
    end="--out $(quoted "$OUT") --resume${FLAGS:+ $FLAGS}"
    [[ $2 != train.py ]] || place=peers end=${end/ --resume/} end=${end/ --compile/}
    for env in $1; do
        [[ -z $DATA || " $DATA " == *" $env "* ]] || continue
        for seed in $seeds; do echo python "$place/$2" --env $env --seed $seed "${@:3}" "$end"; done
    done
}

name() { # VERSION "TASKS" "LEVELS": every task-level-version
    local task level
    for level in $3; do for task in $2; do echo "$task-$level-$1"; done; done
}

demos() { # FILE FLAGS...: three bundled datasets, the replay buffer with five seeds
    seeds=${SEEDS:-0 1 2 3 4} each hopper-replay-demo "$@"
    each "pointmaze-stitch-demo hopper-medium-expert-demo" "$@"
}

commands() {
    local gym="halfcheetah hopper walker2d" hand="pen hammer door relocate" file lam tau data
    local maze="umaze umaze-diverse medium-play medium-diverse large-play large-diverse"
    seeds=${SEEDS:-0 1 2} # where a table names no others
    case $1 in
    fisher_brc_table1 | brac_plus_table1) # BRAC+'s is ACML's; the tables of ICLR's are lost
        data=$(name v0 "$gym" "random medium medium-expert medium-replay")
        [[ $1 == brac* ]] || seeds=${SEEDS:-0 1 2 3 4} data+=" $(name v0 "$gym" expert)"
        each "$data" bc.py
        each "$data" brac.py --name p --no-value-penalty
        each "$data" brac.py --name v --value-penalty
        each "$data" cql.py
        [[ $1 == brac* ]] || each "$data" fisher_brc.py
        [[ $1 != brac* ]] || each "$data" brac_plus_acml.py ;;
    arq_table2) # by dataset, as table A.4; Robomimic has no reader here
        data=$(name v2 "$gym" "expert medium medium-expert medium-replay")
        data+=" $(name v0 "$hand" "human cloned") $(name v0 kitchen "complete partial mixed")"
        data+=" $(name v0 antmaze "$maze")"
        for file in bc td3_bc cql iql awac arq; do each "$data" $file.py; done
        each "$data" arq.py --name qbeta --value sarsa --q-lr 1e-4 ;;
    itrpo_table2 | itrpo_table3)
        seeds=${SEEDS:-0 1 2 3}
        data=$(name v2 "$gym" "random medium medium-replay medium-expert expert")
        [[ $1 == itrpo_table2 ]] || data=$(name v2 antmaze "$maze")
        for file in td3_bc iql cql itrpo; do each "$data" $file.py; done ;;
    modern) # FQL has no locomotion in its paper, and TD3+BC has nothing else in its own
        seeds=${SEEDS:-0 1 2 3 4}
        data=$(name v2 "$gym" "random medium expert medium-expert medium-replay full-replay")
        for file in td3_bc iql rebrac; do each "$data" $file.py; done
        data="$(name v2 antmaze "$maze") $(name v1 "$hand" "human cloned expert")"
        for file in iql rebrac fql; do each "$data" $file.py; done ;;
    ogbench) # the default tasks of FQL's table 3
        seeds=${SEEDS:-0 1 2 3 4 5 6 7}
        data="antmaze-large-navigate-singletask-task1 antmaze-giant-navigate-singletask-task1"
        data+=" humanoidmaze-medium-navigate-singletask-task1"
        data+=" humanoidmaze-large-navigate-singletask-task1"
        data+=" antsoccer-arena-navigate-singletask-task4 cube-single-play-singletask-task2"
        data+=" cube-double-play-singletask-task2 scene-play-singletask-task2"
        data+=" puzzle-3x3-play-singletask-task4 puzzle-4x4-play-singletask-task4"
        for file in bc iql rebrac fql; do each "${data// /-v0 }-v0" $file.py; done ;;
    ablations)
        data="hopper-medium-v0 walker2d-medium-v0 hopper-expert-v0" # Fisher-BRC's figures 2 and 5
        each "$data" fisher_brc.py --name lam0 --lam 0
        for lam in 0.1 1; do
            each "$data" fisher_brc.py --name "lam$lam" --lam $lam
            each "$data" fisher_brc.py --name "no-offset-lam$lam" --no-offset --lam $lam
        done
        data=$(name v2 "$gym" "random medium medium-replay medium-expert expert")
        each "$data" itrpo.py # iTRPO's figure 2(d): with and without the shaped reward
        each "$data" itrpo.py --name tau0 --shape-coef 0
        data="hopper-medium-v2 halfcheetah-medium-replay-v2" # its figures 2(b), (c), (e) and (f)
        for tau in 0.3 0.6 0.9; do # each with the unshaped method that has the same limit
            each "$data" itrpo.py --name "tau$tau" --shape-coef $tau --ratio-min=-inf
            each "$data" itrpo.py --name "control$tau" --shape-coef $tau --control
        done
        each "$data" itrpo.py --name no-bonus --bonus 0
        each "$data" itrpo.py --name no-penalty --lam 0
        each "$data" itrpo.py --name no-clip --ratio-min=-inf
        data="hopper-medium-replay-v0 walker2d-medium-expert-v0 halfcheetah-medium-v0"
        each "$data" brac_plus.py
        each "$data" brac_plus.py --name mmd --divergence mmd --eps None --h0 None
        each "$data" brac_plus.py --name no-penalty --lam 0
        data="hopper-medium-replay-v2 antmaze-medium-play-v0"
        each "$data" arq.py
        each "$data" arq.py --name qbeta --value sarsa --q-lr 1e-4
        each "$data" arq.py --name no-value --value none ;;
    published) # first: python data/make/d4rl.py halfcheetah-random-v2, and walker2d-random-v2
        seeds=${SEEDS:-0 1 2 3 4}
        for file in td3_bc iql; do each halfcheetah-random-v2-made $file.py; done
        seeds=${SEEDS:-0 1}
        each halfcheetah-random-v2-made bc.py
        each halfcheetah-random-v2-made rebrac.py --steps 200000
        seeds=${SEEDS:-0 1 2} each walker2d-random-v2-made td3_bc.py ;;
    corl)
        demos train.py --program corl_td3_bc --checkout "$(quoted "${CORL:-../CORL}")" ;;
    local)
        demos bc.py
        demos bc.py --name top10 --top 0.1
        for file in td3_bc sac_bc awr awac iql cql brac; do demos $file.py; done
        for file in brac_plus brac_plus_acml fisher_brc; do demos $file.py; done
        for file in itrpo arq rebrac fql; do demos $file.py; done ;;
    local_ablations) # beside the runs of local; their tables are in docs/claims.md
        each hopper-medium-expert-demo fisher_brc.py --name lam0 --lam 0
        each hopper-medium-expert-demo fisher_brc.py --name lam0.1 --lam 0.1 # its preset has 1
        each hopper-medium-expert-demo fisher_brc.py --name lam10 --lam 10
        each hopper-medium-expert-demo fisher_brc.py --name no-offset --no-offset
        each hopper-medium-expert-demo brac.py --name alpha0 --alpha 0 # SAC's unrestricted backup
        each hopper-replay-demo itrpo.py --name trust --setting trust
        each hopper-replay-demo itrpo.py --name trust-control --setting trust --control ;;
    *) return 1 ;;
    esac
}

folder() { # COMMAND: the folder of its run
    local file env seed variant=""
    eval "set -- ${1//=/ }"
    file=${2##*/} env=$4 seed=$6
    [[ $2 != peers/* ]] || file=$8
    for (( ; $# > 1; )); do [[ $1 != --name ]] || variant=-$2; shift; done
    echo "$OUT/${env}__${file%.py}${variant}__$seed"
}

run_one() { # COMMAND: its run. The status is 0 or 1, so xargs goes on with the others
    local name status=0 word=finished
    kill -0 "$script" 2>/dev/null || exit 255 # the script itself was killed: xargs ends
    trap : INT TERM                           # the run takes the signal; this waits for it
    name=$(folder "$1") name=${name##*/}
    eval "$1" >>"$OUT/logs/$name.log" 2>&1 </dev/null || status=$? word="FAILED ($status)"
    [[ $status != 130 ]] || word=stopped
    echo "$word: $name: $(tail -n 1 "$OUT/logs/$name.log")"
    return $((status > 0))
}

run_all() { # a signal ends xargs at once; the end of the pipe waits until every run has saved
    local i=0 line
    trap : INT TERM
    printf '%s\n' "$list" | tr '\n' '\0' | xargs -0 -n 1 -P "$JOBS" bash -fc 'run_one "$1"' _ | {
        trap '' INT TERM
        while IFS= read -r line; do i=$((i + 1)) && echo "$i of $total: $line"; done
    }
}

stop() { # SIGNAL: the runs save and end; a second Ctrl-C does not wait
    [[ $stopped ]] || echo "stopping: the runs save (Ctrl-C again: they do not)"
    stopped=1 && kill -s "$1" -- "-$job" || true
}

cd "$(dirname "$0")"
list=$(commands "${1:-}") || {
    sed -n '2,/^set/{/^#/s/^# \{0,1\}//p;}' "$0"
    [[ -z ${1:-} ]] || echo "there is no table $1: use one of those above" >&2
    exit 2
}
[[ ${2:-} =~ ^(--print|--slurm)?$ ]] || refuse "$2 is unknown: use --print or --slurm"
[[ $JOBS =~ ^[1-9][0-9]*$ ]] || refuse "JOBS is '$JOBS': use a whole number of 1 or more"
[[ ${SEEDS-0} =~ ^\ *[0-9]+(\ +[0-9]+)*\ *$ ]] || refuse "SEEDS is '$SEEDS': use whole numbers"
[[ $OUT != -* && $OUT != *$'\n'* ]] || refuse "OUT is '$OUT': use the name of a folder"
[[ $FLAGS != *$'\n'* ]] || refuse "FLAGS has more than one line: use one"
bash -nc ": $FLAGS" 2>/dev/null || refuse "FLAGS is '$FLAGS': close its quotes"
[[ ! " $FLAGS" =~ \ --(env|seed|out)[=\ ] ]] || refuse "FLAGS: use DATA, SEEDS or OUT instead"
all=$(DATA="" && commands "$1" | awk '!seen[$4]++ { printf "%s ", $4 }')
for env in $DATA; do [[ " $all" == *" $env "* ]] || refuse "DATA is '$DATA': use some of $all"; done
[[ ${2:-} != --print ]] || { echo "$list" && exit; }
total=$(printf '%s\n' "$list" | wc -l | tr -d ' ')
mkdir -p "$OUT/logs" 2>/dev/null || refuse "OUT is '$OUT': no folder can be made there"
if [[ ${2:-} == --slurm ]]; then # one array job, whose task i runs line i of a list of its own
    file=$OUT/logs/$1-$(printf '%s' "$list" | cksum | cut -d ' ' -f 1).txt
    echo "$list" >"$file"
    sbatch --requeue --open-mode=append --signal=B:TERM@120 ${SBATCH_FLAGS:-} --job-name "$1" \
        --array "1-$total%$JOBS" --output "$OUT/logs/%x_%a.slurm" --wrap "set -fx
            export OMP_NUM_THREADS=\${SLURM_CPUS_PER_TASK:-1}
            eval \"exec \$(sed -n \"\${SLURM_ARRAY_TASK_ID}p\" $(quoted "$file"))\""
    exit
fi
command -v python >/dev/null || refuse "there is no python: activate an environment"
echo "$total runs, $JOBS at a time; their output is in $OUT/logs"
cores=$(getconf _NPROCESSORS_ONLN) script=$$ stopped="" status=0
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > JOBS ? cores / JOBS : 1))} OUT script
export -f run_one folder
set -m # a process group of its own: a signal reaches every run once, from here alone
run_all & job=$!
set +m
trap 'stop INT' INT && trap 'stop TERM' TERM HUP
while wait "$job" || status=$?; [[ $(jobs -rp) ]]; do :; done # a signal interrupts wait
[[ ! $stopped ]] || { echo "stopped; the same command continues" && exit 130; }
missing=$(echo "$list" | while read -r command; do
    [[ -e $(folder "$command")/summary.json ]] || echo "$command"
done)
[[ ! $missing ]] || printf '%s\n' "runs without a summary:" "$missing"
[[ ! $missing && $status == 0 ]]
