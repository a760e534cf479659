#!/usr/bin/env bash
# One machine's part of a run over several. From the root of the repository, on each machine with its own MACHINE_RANK:
#
#   MACHINES=2 MACHINE_RANK=0 MAIN_ADDRESS=node0 ds_configs/multinode.sh ds_configs/ddp_gpu8.yaml RUN_DIR RECIPE OPTION...
#
# MACHINE_RANK counts from 0, whose address MAIN_ADDRESS is (under Slurm it is the node's number); MAIN_PORT is a free port there
# (29500); PROCESSES is how many a machine starts (what the launch file has). All machines see the same data and RUN_DIR.
#
# SIGTERM, SIGUSR1 or SIGINT to any of them stops the whole run in order: accelerate launch is sent a SIGTERM, which it
# hands to its ranks, and they agree on it with all others. (A SIGUSR1 would kill it, and leave its ranks behind.)
# Exit codes, from RUN_DIR/outcome.json: 0 done, 75 stopped: start all again to go on, 2 a mistake, 1 a defect.
set -uo pipefail

if [ $# -lt 3 ]; then
    echo "usage: MACHINES=N MACHINE_RANK=R MAIN_ADDRESS=HOST $0 LAUNCH_FILE RUN_DIR RECIPE [OPTION...]" >&2
    exit 2
fi
launch_file=$1 run_dir=$2 recipe=$3
shift 3
machines=${MACHINES:?the number of machines}
machine_rank=${MACHINE_RANK:-${SLURM_NODEID:?set MACHINE_RANK: the number of this machine, from 0}}
main_address=${MAIN_ADDRESS:?the address of machine 0}
if [ ! -f "$launch_file" ]; then
    echo "error: there is no launch file $launch_file in $PWD: take one of ds_configs/, from the root of the repository" >&2
    exit 2
fi
processes=${PROCESSES:-$(sed -n 's/^num_processes: *//p' "$launch_file")}

accelerate launch --config_file "$launch_file" \
    --num_machines "$machines" --machine_rank "$machine_rank" --num_processes $((machines * processes)) \
    --main_process_ip "$main_address" --main_process_port "${MAIN_PORT:-29500}" \
    --deepspeed_multinode_launcher standard \
    "$recipe" --run-dir "$run_dir" "$@" &
launcher=$!
trap 'kill -TERM "$launcher" 2>/dev/null' TERM USR1 INT
while :; do # a trapped signal ends the wait, not the launcher
    wait "$launcher"
    code=$?
    kill -0 "$launcher" 2>/dev/null || break
done

case $(sed -n 's/.*"outcome": "\([a-z]*\)".*/\1/p' "$run_dir/outcome.json" 2>/dev/null) in
    done) exit 0 ;;
    requeue) exit 75 ;;
    error) exit 2 ;;
    *) exit $((code == 0 ? 1 : code)) ;; # it was killed before it could say anything
esac
