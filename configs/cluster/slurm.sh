#!/bin/bash
#SBATCH --job-name=cibl-ray
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=32
#SBATCH --gpus-per-node=4
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
# A run on a Slurm cluster: sbatch configs/cluster/slurm.sh imagenet_lt --name imagenet-lt
# Submit from a folder that all nodes see, with the project's virtual environment in .venv; runs/ is made there. --name is needed:
# a job that ran out of time or was preempted is put into the queue again, and resumes that run.
set -euo pipefail
source .venv/bin/activate

name=
for ((i = 1; i < $#; i++)); do
  if [ "${!i}" = --name ]; then next=$((i + 1)) && name=${!next}; fi
done
[ -n "$name" ] || { echo "slurm.sh: give the run a --name" >&2; exit 2; }
resume=()
if [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ] && [ -d "runs/$name" ]; then resume=(--resume "runs/$name"); fi

export RAY_AUTH_MODE=token
RAY_AUTH_TOKEN=$(python -c 'import secrets; print(secrets.token_hex(32), end="")') # srun passes the environment on
export RAY_AUTH_TOKEN
# A short folder of this job's own: /tmp/ray may belong to another user.
export RAY_TMPDIR=/tmp/ray-$SLURM_JOB_ID
umask 077

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${nodes[0]}
address=$(srun --nodes=1 --ntasks=1 -w "$head" hostname --ip-address | awk '{print $1}')
base=$((20000 + SLURM_JOB_ID % 40 * 300)) # jobs of several users may share a node; below the ports that Linux hands out
port=$base
ports=(--node-manager-port=$((base + 1)) --object-manager-port=$((base + 2)) --dashboard-agent-listen-port=$((base + 3))
  --dashboard-agent-grpc-port=$((base + 4)) --runtime-env-agent-port=$((base + 5)) --metrics-export-port=$((base + 6))
  --min-worker-port=$((base + 10)) --max-worker-port=$((base + 299)))
gpus=${SLURM_GPUS_ON_NODE:-0}

start() { # node, then the options of `ray start`
  # srun does not take --cpus-per-task over from sbatch: without it Ray and all its workers could be bound to one core.
  srun --nodes=1 --ntasks=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" --overlap -w "$1" bash -c 'mkdir -p "$RAY_TMPDIR" && exec "$@"' - \
    ray start --block --num-cpus="$SLURM_CPUS_PER_TASK" --num-gpus="$gpus" "${ports[@]}" "${@:2}" &
}
finish() {
  srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --overlap rm -rf "$RAY_TMPDIR" || true
}
trap finish EXIT
start "$head" --head --node-ip-address="$address" --port="$port" --include-dashboard=false --ray-client-server-port=$((base + 7))
for _ in $(seq 60); do
  ray status --address="$address:$port" > /dev/null 2>&1 && break
  sleep 2
done
for node in "${nodes[@]:1}"; do start "$node" --address="$address:$port"; done

workers=$((SLURM_JOB_NUM_NODES * (gpus > 0 ? gpus : 1)))
python -m cibl_ray.train "$@" "${resume[@]}" --cluster --address "$address:$port" --workers "1-$workers" &
run=$!
trap 'kill -TERM $run' TERM USR1 # Slurm's warning before the time is up or the job is preempted: the run saves and ends
wait $run || true
while kill -0 $run 2> /dev/null; do wait $run || true; done # a trap ends a wait, not the run
status=0
wait $run || status=$? # bash remembers it
if [ $status -eq 75 ]; then scontrol requeue "$SLURM_JOB_ID"; fi # it saved because it was asked to end
exit $status
