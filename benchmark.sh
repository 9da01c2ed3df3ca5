#!/usr/bin/env bash
# The papers' tables and our own, as literal commands: one line for each run. Finished runs are
# skipped, and runs that were stopped continue (those of the table corl start anew).
#
#   ./benchmark.sh TABLE                  run it here; Ctrl-C saves and says how to continue
#   ./benchmark.sh TABLE --print          list its commands, for parallel, xargs or job arrays
#   ./benchmark.sh TABLE --slurm          submit one SLURM array job, JOBS runs at a time
#   python tools/report.py runs --table TABLE   results beside the paper's: modern, ogbench and the
#                                               tables that are named after a paper
#   python tools/report.py runs                 the results of the other tables
#
# TABLE            what it runs                                                    seeds
# local            every algorithm on the three bundled datasets: 135 runs             3
# local_ablations  three methods of local, each without the part that its paper adds   3
# corl             CORL's own TD3+BC and IQL on the three bundled datasets             3
# modern           TD3+BC, IQL, ReBRAC and FQL on D4RL, as their papers do             5
# ogbench          IQL, ReBRAC and FQL on the default task of OGBench's ten data sets  8
# ablations        the ablations of the papers of Fisher-BRC, iTRPO, BRAC+ and ARQ     3
# fisher_brc_table1 brac_plus_table1 arq_table2 itrpo_table2 itrpo_table3    the paper's
#
# The runs of local take 1 to 20 minutes each, about 11 hours of one core in all (AMD EPYC, Zen 4).
# Those of the papers' tables train for a million steps.
#
# Variables:
#   SEEDS="0 1 2"         these seeds instead
#   DATA=hopper-replay-demo   only this dataset of the table
#   JOBS=4                four runs at a time, which share the cores; the default is 1
#   OUT=runs              folder of the runs
#   FLAGS="--compile"     added to every command; CORL's programs are not compiled
#   CORL=../CORL          checkout of github.com/tinkoff-ai/CORL at 6afec90, for the table corl
#   SBATCH_FLAGS="--gres=gpu:1 --cpus-per-task=4 --time=1-0"    for --slurm
#
# How fp32 products are computed (--precision) is measured once for each kind of processor, also by
# --print, and kept in OUT/logs, unless FLAGS has it. Where a list is printed on a machine without a
# GPU for machines that have one, use FLAGS="--precision highest". Runs side by side need one thread
# each. Many machines with one folder:
#   ./benchmark.sh TABLE --print | sed 's/^/OMP_NUM_THREADS=1 /' |
#       parallel --sshloginfile hosts --workdir "$PWD" --jobs 1
set -feuo pipefail

quoted() { # TEXT as one word of the shell
    if [[ $1 =~ ^[A-Za-z0-9_./:+,-]+$ ]]; then echo "$1"; else echo "'${1//\'/\'\\\'\'}'"; fi
}

again="" # the command that continues this one, with the variables that were set
for variable in SEEDS DATA JOBS OUT FLAGS CORL; do
    [[ -z ${!variable:-} ]] || again+="$variable=$(quoted "${!variable}") "
done
again+="$(quoted "$0") ${1:-}"
JOBS=${JOBS:-1} OUT=${OUT:-runs} FLAGS=${FLAGS:-} DATA=${DATA:-}

# ---- commands ------------------------------------------------------------------------------------

each() { # "DATASETS" FILE FLAGS...: one command per dataset and seed
    local env seed
    for env in $1; do
        [[ -z $DATA || " $DATA " == *" $env "* ]] || continue
        for seed in $seeds; do
            echo python "algorithms/$2" --env "$env" --seed "$seed" "${@:3}" \
                --out "$(quoted "$OUT")" --resume $FLAGS
        done
    done
}

name() { # VERSION "TASKS" "LEVELS": every task-level-version
    local task level
    for level in $3; do for task in $2; do echo "$task-$level-$1"; done; done
}

commands() {
    local gym="halfcheetah hopper walker2d" hand="pen hammer door relocate" file lam tau data
    local bundled="hopper-medium-expert-demo hopper-replay-demo pointmaze-medium-demo"
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
        for file in bc td3_bc cql iql awac arq; do each "$data" $file.py; done
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
    modern) # FQL has no locomotion in its paper, and TD3+BC has nothing else in its own
        seeds=${SEEDS:-0 1 2 3 4}
        data=$(name v2 "$gym" "random medium expert medium-expert medium-replay full-replay")
        for file in td3_bc iql rebrac; do each "$data" $file.py; done
        data="$(name v2 antmaze "$maze") $(name v1 "$hand" "human cloned expert")"
        for file in iql rebrac fql; do each "$data" $file.py; done
        ;;
    ogbench) # FQL's table 3, its settings of IQL and ReBRAC too; the networks are their files' own
        seeds=${SEEDS:-0 1 2 3 4 5 6 7}
        ogbench antmaze-large-navigate 1 0.99 10 0.003 0.01
        ogbench antmaze-giant-navigate 1 0.995 10 0.003 0.01
        ogbench humanoidmaze-medium-navigate 1 0.995 10 0.01 0.01
        ogbench humanoidmaze-large-navigate 1 0.995 10 0.01 0.01
        ogbench antsoccer-arena-navigate 4 0.995 1 0.01 0.01
        ogbench cube-single-play 2 0.99 1 1 0
        ogbench cube-double-play 2 0.99 0.3 0.1 0
        ogbench scene-play 2 0.99 10 0.1 0.01
        ogbench puzzle-3x3-play 4 0.99 10 0.3 0.01
        ogbench puzzle-4x4-play 4 0.99 3 0.3 0.01
        ;;
    ablations)
        seeds=${SEEDS:-0 1 2}
        data="hopper-medium-v0 walker2d-medium-v0 hopper-expert-v0" # Fisher-BRC's figures 2 and 5
        for lam in 0 0.1 1; do each "$data" fisher_brc.py --name "lam$lam" --lam $lam; done
        for lam in 0.1 1; do
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
        each "$data" itrpo.py --name no-penalty --penalty 0
        each "$data" itrpo.py --name no-clip --ratio-min=-inf
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
    corl)
        seeds=${SEEDS:-0 1 2}
        for data in $bundled; do
            for file in td3_bc iql; do
                each $data "$file" --corl "$(quoted "${CORL:-../CORL}")" |
                    sed 's|algorithms/\([a-z0-9_]*\)|tools/corl.py --algorithm \1|; s/ --resume//; s/ --compile//'
            done
        done
        ;;
    local)
        seeds=${SEEDS:-0 1 2}
        for data in $bundled; do
            each $data bc.py
            each $data bc.py --name top10 --top 0.1
            for file in td3_bc sac_bc awr awac iql cql; do each $data $file.py; done
            for file in brac fisher_brc brac_plus itrpo arq; do each $data $file.py; done
            for file in rebrac fql; do each $data $file.py; done
        done
        ;;
    local_ablations) # beside local, where BRAC+'s bound stands beside BRAC's sampled divergence
        seeds=${SEEDS:-0 1 2}
        each hopper-medium-expert-demo fisher_brc.py --name no-offset --no-offset
        each hopper-medium-expert-demo brac.py --name alpha0 --alpha 0 # SAC's unrestricted backup
        each hopper-replay-demo itrpo.py --name tau0 --shape-coef 0
        ;;
    *) return 1 ;;
    esac
}

ogbench() { # DATA TASK, the discount, IQL's beta, ReBRAC's weights of cloning in actor and critics
    local env=$1-singletask-task$2-v0 protocol="--eval-every 100000 --eval-episodes 50"
    each "$env" fql.py
    each "$env" iql.py --tau 0.9 --beta "$4" --gamma "$3" --reward-shift 0 $protocol
    each "$env" rebrac.py --actor-bc "$5" --critic-bc "$6" --gamma "$3" --reward-scale 1 \
        --batch-size 256 --actor-lr 3e-4 --critic-lr 3e-4 $protocol
}

# ---- how they run --------------------------------------------------------------------------------

refuse() { echo "$1" >&2 && exit 2; }

precision() { # " --precision WORD", one for all runs of the folder OUT on this kind of processor
    local device=auto found kept
    [[ " $FLAGS" =~ \ --precision[=\ ] ]] && return
    [[ " $FLAGS" =~ \ --device[=\ ]+([^ ]+) ]] && device=${BASH_REMATCH[1]}
    make_logs
    command -v python >/dev/null || refuse "there is no python: activate an environment"
    found=$(python -c "
import re, sys
from harness.device import prepare_device, set_precision
from tools.speed import processor
device = prepare_device(sys.argv[1])
word = 'highest' if device.type == 'cuda' else set_precision('auto', device)[0]
print(word, device.type + '-' + re.sub(r'\W+', '-', processor()))
" "$device" 2>&1 | tail -n 1) ||
        refuse "no run is started: $found"
    kept=$OUT/logs/precision-${found#* }
    echo "${found% *}" >"$kept.$$"
    ln "$kept.$$" "$kept" 2>/dev/null || true # the first to choose decides
    rm -f "$kept.$$"
    echo " --precision $(<"$kept")"
}

make_logs() {
    mkdir -p "$OUT/logs" 2>/dev/null || refuse "OUT is '$OUT': no folder can be made there"
}

run_name() { # COMMAND: the name of its run's folder
    local words=() env="" seed="" variant="" i
    eval "words=($1)"
    for ((i = 2; i < ${#words[@]}; i++)); do
        case ${words[i]} in
        --env) env=${words[i + 1]//\//-} ;;
        --seed) seed=${words[i + 1]} ;;
        --name) variant=-${words[i + 1]} ;;
        --algorithm) variant=_${words[i + 1]}$variant ;; # of tools/corl.py
        esac
    done
    i=${words[1]##*/}
    echo "${env}__${i%.py}${variant}__$seed"
}

worker() { # take one command of the list after the other, until a signal comes
    local i=0 command name log status
    set +m
    trap : INT TERM # the run takes the signal; this waits for it
    while IFS= read -r command; do
        i=$((i + 1))
        [[ -e $state/stop ]] && return
        kill -0 $$ 2>/dev/null || return # the script itself was killed
        mkdir "$state/run-$i" 2>/dev/null || continue # another worker has it
        name=$(run_name "$command") status=0
        log=$OUT/logs/$name.log
        eval "$command" >>"$log" 2>&1 </dev/null || status=$?
        if [[ $status == 0 ]]; then
            echo "finished $(ticket) of $total: $name: $(tail -n 1 "$log")"
        elif [[ -e $state/stop && $status -ge 128 ]]; then
            echo "stopped: $name: $(tail -n 1 "$log")"
        else
            echo "FAILED ($status), $(ticket) of $total: $name: $(tail -n 1 "$log")"
            echo "$command # exit status $status, see $log" >>"$state/failed"
        fi
    done <"$state/list"
}

ticket() { # 1, 2, 3, ...: every call has the next number
    local n=1
    while ! mkdir "$state/ended-$n" 2>/dev/null; do n=$((n + 1)); done
    echo "$n"
}

stop() { # SIGNAL: the runs save and end; a second Ctrl-C does not wait
    [[ -e $state/stop ]] || echo "stopping: the runs save (Ctrl-C again: they do not)"
    : >"$state/stop"
    local pid
    for pid in $workers; do kill -s "$1" -- "-$pid" 2>/dev/null || true; done
}

run_all() { # JOBS workers; returns after the last run has saved
    local i
    total=$(wc -l <<<"$list" | tr -d ' ')
    state=$(mktemp -d)
    trap 'rm -rf "$state"' EXIT
    echo "$list" >"$state/list"
    workers=""
    echo "$total runs, $JOBS at a time; their output is in $OUT/logs"
    trap 'stop INT' INT
    trap 'stop TERM' TERM HUP
    for ((i = 0; i < JOBS && i < total; i++)); do
        set -m # a process group of its own: a signal reaches its run once, and from here alone
        worker &
        set +m
        workers+=" $!"
    done
    while [[ $(jobs -rp) ]]; do wait || true; done
    [[ ! -s $state/failed ]] || { echo "failed runs:" && cat "$state/failed"; }
    if [[ -e $state/stop ]]; then
        echo "stopped; continue with: $again"
        exit 130
    fi
    [[ ! -s $state/failed ]] || exit 1
}

submit() { # one array job, whose task i runs line i of the list
    local file
    make_logs
    file=$OUT/logs/$1-$(cksum <<<"$list" | cut -d ' ' -f 1).txt # pending jobs keep their own list
    echo "$list" >"$file"
    sbatch --requeue --open-mode=append --signal=B:TERM@120 ${SBATCH_FLAGS:-} --job-name "$1" \
        --array "1-$(wc -l <"$file" | tr -d ' ')%$JOBS" --output "$OUT/logs/%x_%a.slurm" \
        --wrap "exec bash benchmark.sh --task $(quoted "$file")"
}

task() { # LIST: the line of this array task; its exit status is the run's
    local command
    command=$(sed -n "${SLURM_ARRAY_TASK_ID:-0}p" "$1")
    [[ $command ]] || refuse "$1 has no line ${SLURM_ARRAY_TASK_ID:-0}: submit it with --slurm"
    export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}
    OUT=${1%/logs/*} FLAGS=$command
    command+=$(precision)
    echo "$command"
    eval "exec $command"
}

cd "$(dirname "$0")"
if [[ ${1:-} == --task ]]; then task "$2"; fi
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
if [[ $DATA ]]; then
    known=$(DATA="" && commands "$1" | sed 's/.* --env \([^ ]*\) .*/\1/' | awk '!seen[$0]++')
    for variable in $DATA; do
        [[ " ${known//$'\n'/ } " == *" $variable "* ]] ||
            refuse "DATA is '$DATA': $1 has ${known//$'\n'/, }"
    done
fi
cores=$(getconf _NPROCESSORS_ONLN)
case ${2:-} in
--slurm) submit "$1" ;; # every task chooses the precision on its own machine
*)
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > JOBS ? cores / JOBS : 1))}
    chosen=$(precision)
    list=$(sed "s/\$/$chosen/" <<<"$list")
    if [[ ${2:-} ]]; then echo "$list" && exit; fi
    make_logs
    run_all
    ;;
esac
