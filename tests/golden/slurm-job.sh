#!/bin/bash
#SBATCH --job-name=tiny-12e7b4af-0001
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --signal=B:TERM@120
#SBATCH --export=NONE
#SBATCH --propagate=NONE
#SBATCH --chdir=/
#SBATCH --open-mode=append
#SBATCH --output="/shared/my runs/tiny/submissions/0001/job.log"
# Ray starts on the allocation, its head here and a node on every other machine (srun), and drives the run. On SIGTERM, which comes before the
# time limit and with `scancel --batch --signal=TERM`, the run saves a checkpoint and the job goes back into the queue, to continue from there.
unset SLURM_JWT
export PYTHONPATH='/shared/my runs/tiny/submissions/0001/maskwright-0.zip'
exec /opt/venv/bin/python -P -m launcher.clusters.allocation '/shared/my runs/tiny' 1
#!/bin/bash
#SBATCH --job-name=tiny-12e7b4af-0001
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=64
#SBATCH --gpus-per-node=8
#SBATCH --partition=gpu
#SBATCH --account=my-project
#SBATCH --time=12:00:00
#SBATCH --constraint=h100&nvlink
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --no-kill
#SBATCH --signal=B:TERM@300
#SBATCH --export=NONE
#SBATCH --propagate=NONE
#SBATCH --chdir=/
#SBATCH --open-mode=append
#SBATCH --output="/shared/my runs/tiny/submissions/0001/job.log"
# Ray starts on the allocation, its head here and a node on every other machine (srun), and drives the run. On SIGTERM, which comes before the
# time limit and with `scancel --batch --signal=TERM`, the run saves a checkpoint and the job goes back into the queue, to continue from there.
module load cuda/13
export HTTPS_PROXY=http://proxy:3128
unset SLURM_JWT
export PYTHONPATH='/shared/my runs/tiny/submissions/0001/maskwright-0.zip'
exec /opt/venv/bin/python -P -m launcher.clusters.allocation '/shared/my runs/tiny' 1
