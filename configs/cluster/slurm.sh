#!/bin/bash
#SBATCH --job-name=cibl-ray
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=32
#SBATCH --gpus-per-node=4
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@120
# A run on a Slurm cluster: sbatch configs/cluster/slurm.sh imagenet_lt --name imagenet-lt
# Submit from a folder that all nodes see, with the project's virtual environment in .venv; runs/ is made there. A job that ran
# out of time goes on with: sbatch configs/cluster/slurm.sh --resume runs/imagenet-lt
set -euo pipefail
source .venv/bin/activate
export RAY_AUTH_MODE=token
[ -s ~/.ray/auth_token ] || { mkdir -p ~/.ray && (umask 077 && python -c 'import secrets; print(secrets.token_hex(32), end="")' > ~/.ray/auth_token); }

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${nodes[0]}
address=$(srun --nodes=1 --ntasks=1 -w "$head" hostname --ip-address | awk '{print $1}')
port=$((20000 + SLURM_JOB_ID % 20000)) # two jobs of one user may share a node
gpus=${SLURM_GPUS_ON_NODE:-0}

start() { # node, then the options of `ray start`
  # srun does not take --cpus-per-task over from sbatch: without it Ray and all its workers could be bound to one core.
  srun --nodes=1 --ntasks=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" --overlap -w "$1" ray start --block --num-cpus="$SLURM_CPUS_PER_TASK" --num-gpus="$gpus" "${@:2}" &
}
start "$head" --head --node-ip-address="$address" --port="$port" --dashboard-host=127.0.0.1
for _ in $(seq 60); do
  ray status --address="$address:$port" > /dev/null 2>&1 && break
  sleep 2
done
for node in "${nodes[@]:1}"; do start "$node" --address="$address:$port"; done

workers=$((SLURM_JOB_NUM_NODES * (gpus > 0 ? gpus : 1)))
python -m cibl_ray.train "$@" --cluster --address "$address:$port" --workers "1-$workers" &
run=$!
trap 'kill -TERM $run' TERM # Slurm's warning before the time is up: the run ends in order, its last checkpoint stays
wait $run || wait $run # the first ends with the trap
